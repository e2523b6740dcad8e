"""Shared by the commands of this package: model, server, and parsing of numbers."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn

from vllm_vtprune_checkpoints import DEFAULT, FAMILIES, TRAINED, WITH_CODE, embedded_checkpoint
from vllm_vtprune_server.process import announced_server

QUIET_OPTIONS = ("--no-enable-log-requests", "--disable-uvicorn-access-log")
SERVE_OPTIONS = ("--enforce-eager", *QUIET_OPTIONS)
SMALL_OPTIONS = ("--max-model-len", "2048")  # enough for the embedded model's 576 tokens


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model`` and ``--url``."""
    parser.add_argument("--model", help="directory of a model, or name on the hub (default: the demo model)")
    parser.add_argument("--url", help="address of a running server of that model, such as http://localhost:8000")


def add_family_argument(parser: argparse.ArgumentParser) -> None:
    """``--family``, of the small checkpoint that stands in for a model."""
    parser.add_argument(
        "--family",
        choices=list(FAMILIES),
        default=DEFAULT,
        metavar="FAMILY",
        help="without a model: family of the small checkpoint, such as qwen3_vl; all but llava have random weights "
        "(default: %(default)s)",
    )


def model_of(args: argparse.Namespace) -> tuple[str, bool]:
    """The model of a command with ``--family``, for vLLM; and whether it is a checkpoint of ours that brings code."""
    return args.model or str(embedded_checkpoint(args.family)), args.model is None and args.family in WITH_CODE


def load_format(options: Sequence[str]) -> str | None:
    """The value of vLLM's option ``--load-format`` among these; None without."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load-format", "--load_format")
    value: str | None = parser.parse_known_args(options)[0].load_format
    return value


def dtype_of(args: argparse.Namespace) -> str:
    """The dtype of encoder and server: float32 for the embedded model, which is faster than bfloat16 on CPUs."""
    return "auto" if args.model or args.url else "float32"


def count(text: str) -> int:
    """A whole number from 1."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; expected a whole number from 1")
    return number


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, such as 1024x768."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; expected WIDTHxHEIGHT, such as 1024x768")
    return int(width), int(height)


def names(text: str, known: Iterable[str]) -> list[str]:
    """Some of the known names, separated by commas; "all" for all."""
    known = list(known)
    chosen = known if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not accepted; expected any of {', '.join(known)}")
    return chosen


def make_folder(folder: Path, option: str) -> None:
    """Create a folder for results and its parents.

    Raises:
        SystemExit: the folder cannot be created; the message names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{option}: {folder} cannot be created ({error.strerror}); expected a new or existing folder")


@contextmanager
def served(url: str | None, model: str, dtype: str = "auto") -> Iterator[str]:
    """The URL of a server of the model: ``url``, or that of a server started for the context."""
    if url:
        yield url.rstrip("/")
        return
    small = model == embedded_model()
    options = [*SERVE_OPTIONS, "--dtype", dtype, *(SMALL_OPTIONS if small else ())]
    name = "the demo model" if small else model
    with announced_server(name, [model, *options]) as started_url:
        yield started_url


def interrupted() -> NoReturn:
    """Exit after Ctrl-C.

    Raises:
        SystemExit: 130.
    """
    print("\nInterrupted; run the same command to continue.", file=sys.stderr)
    sys.exit(130)


def shown(path: Path) -> str:
    """A path for display: relative if it is in the working directory."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def embedded_model() -> str:
    """Directory of the embedded model."""
    return str(TRAINED)


@cache
def weights_digest(model: str) -> str:
    """A digest of the weights if the model is a directory, else its name."""
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return model
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]

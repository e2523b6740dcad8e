"""`vtprune bench`: the unpruned model against presets, on your machine, model and pictures."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from vllm_vtprune import __version__
from vllm_vtprune.options import EnergyBudget
from vllm_vtprune.policy import BUILTIN_PRESETS, PolicyError, PruningPolicy
from vllm_vtprune_checkpoints import DEFAULT, RANDOM_WEIGHTS, weights_of
from vllm_vtprune_evaluation.bench import report, summary
from vllm_vtprune_evaluation.bench.rounds import OFF, STOCK, Arm, Asker, Level, Measured, turn
from vllm_vtprune_evaluation.bench.subjects import NoPictures, Subject, files, generated, scenes
from vllm_vtprune_evaluation.load.client import ServerMissing, ask, connect, served_model
from vllm_vtprune_evaluation.load.records import save_records
from vllm_vtprune_evaluation.options import (
    QUIET_OPTIONS,
    SMALL_OPTIONS,
    add_family_argument,
    count,
    load_format,
    make_folder,
    model_of,
    shown,
    size,
)
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_server.launch import add_pruning_options
from vllm_vtprune_server.process import STOCK_COMMAND, ServerFailed, announced_server

TIMEOUT = 600.0  # seconds without a byte after which a request has failed
TURNS = 2  # how often stock vLLM and our server take turns
QUESTION = "What is in this picture?"
SMALL = ("--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(2**30), *SMALL_OPTIONS)

EXAMPLE = """examples:
  vtprune bench                                                  # the demo model, about three minutes on two cores
  vtprune bench llava-hf/llava-1.5-7b-hf --images photographs --presets balanced fast --concurrency 1 8 32
  vtprune bench MODEL --presets '{"budget": {"type": "tokens", "keep": 64}}' --stock -- --max-model-len 4096
  vtprune bench --url http://localhost:8000 --presets balanced   # a server that runs already
"""


class NoResult(Exception):
    """What was measured is no result; the message has one sentence for each reason."""


def bench(argv: list[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: 2 for invalid options; 1 if the server or a request fails or nothing was pruned; 130 when
            interrupted.
    """
    args = _parse(argv)
    started = time.monotonic()
    arms = [Arm(OFF, False), *args.presets]
    print(f"vtprune bench: {args.name}; {', '.join(arm.name for arm in arms)}", file=sys.stderr, flush=True)
    make_folder(args.out, "--out")
    measured = Measured()
    raw = args.out / "requests.jsonl"
    try:
        subjects = _subjects(args)
        model = _measure(args, arms, subjects, measured)
        alerts = summary.complaints(_asked(args, arms), measured)
    except KeyboardInterrupt:
        save_records(raw, measured.records())
        kept = sum(1 for _ in measured.records())
        print(f"\nInterrupted; {kept} requests are kept in {shown(raw)}.", file=sys.stderr)
        sys.exit(130)
    except (NoPictures, NoResult, ServerFailed) as error:
        save_records(raw, measured.records())
        sys.exit(f"vtprune bench: {error}")
    speeds, qualities = summary.speeds(measured), summary.qualities(measured, subjects)
    about = _about(args, argv, model, subjects, time.monotonic() - started)
    save_records(raw, measured.records())
    values = {"about": about, "complaints": alerts, "arms": [*map(asdict, qualities)], "levels": [*map(asdict, speeds)]}
    (args.out / "results.json").write_text(json.dumps(values, indent=1) + "\n")
    notes = [f"Not a result: {alert}." for alert in alerts] + ([RANDOM_WEIGHTS] if args.random else [])
    title = f"vtprune bench, {args.name}"
    report.write_html(args.out / "report.html", title, speeds, qualities, measured, subjects, about, notes)
    print(report.text(speeds, qualities))
    if args.random:
        print(RANDOM_WEIGHTS)
    print(f"Report: {shown(args.out / 'report.html')}, results.json, requests.jsonl", file=sys.stderr)
    if alerts:
        sys.exit("\n".join(f"vtprune bench: not a result: {alert}" for alert in alerts))


def _parse(argv: list[str]) -> argparse.Namespace:
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="vtprune bench",
        description="Ask a server about pictures without pruning and under presets, in turns; compare speed, tokens\n"
        "and answers. Options after -- are those of `vtprune serve`.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="directory of a model, or name on the hub (default: the demo model)")
    parser.add_argument("--url", help="address of a running `vtprune serve` instead, such as http://localhost:8000")
    add_family_argument(parser)
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["balanced", "fast"],
        metavar="POLICY",
        help="presets, or policies as JSON (default: balanced fast)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of pictures (default: generated ones)")
    parser.add_argument("--question", default=QUESTION, help="about each picture of --images (default: %(default)s)")
    parser.add_argument(
        "--size",
        nargs="+",
        type=size,
        default=[(1024, 768)],
        metavar="WxH",
        help="pixels of generated pictures, but for the small checkpoints (default: 1024x768)",
    )
    parser.add_argument(
        "--pictures", type=count, default=32, metavar="N", help="most pictures to ask about (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency", nargs="+", type=count, default=[1, 4, 16], metavar="N", help="clients (default: 1 4 16)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--requests",
        type=count,
        default=24,
        metavar="N",
        help="fewest requests of each arm for each number of clients (default: %(default)s)",
    )
    length.add_argument(
        "--seconds", type=count, metavar="S", help="about so long for each number of clients, instead of --requests"
    )
    parser.add_argument(
        "--max-tokens", type=count, default=16, metavar="N", help="tokens of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--stock", action="store_true", help="also stock vLLM, without our plugin, in turns with our server"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), metavar="DIR", help="output folder (default: %(default)s)"
    )
    args = parser.parse_args(own)
    args.extra = extra
    if args.url and (args.model or extra or args.stock or args.family != DEFAULT):
        parser.error("--url: cannot be combined with a model, --family, --stock or options of the server")
    known = not args.url and not any(option.startswith("--pruning-presets") for option in extra)
    try:
        args.presets = [_arm(text, known) for text in dict.fromkeys(args.presets)]
    except PolicyError as error:
        parser.error(str(error))
    names = [arm.name for arm in args.presets]
    if len(set(names) | {OFF, STOCK}) < len(names) + 2:
        parser.error(f"--presets: {', '.join(names)} given; expected different policies, and neither {OFF} nor {STOCK}")
    args.concurrency = sorted(set(args.concurrency))
    weights = None if args.url else weights_of(args.model, args.family)
    args.random = weights == "random" or load_format(extra) == "dummy"
    args.name = args.url or args.model or ("the demo model" if weights == "trained" else f"a tiny {args.family}")
    args.small = not args.url and args.model is None
    return args


def _arm(text: str, known: bool) -> Arm:
    """An arm from the command line; ``known``: only the built-in presets are there."""
    if not text.lstrip().startswith("{"):
        if known and text not in BUILTIN_PRESETS:
            near = get_close_matches(text, BUILTIN_PRESETS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            accepted = f"a policy as JSON, or one of {', '.join(BUILTIN_PRESETS)}"
            raise PolicyError("--presets", text, accepted, f"{text} is not a preset{hint}")
        return Arm(text, text)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise PolicyError("--presets", text, "a policy as JSON", f"{text} is not JSON ({error})") from error
    policy = PruningPolicy.parse(value, param="--presets")
    budget = policy.budget
    size = f"+E@{budget.threshold:g}" if isinstance(budget, EnergyBudget) else f"@{getattr(budget, 'keep', 'own'):.4g}"
    return Arm(f"{policy.method}{size}", value)


def _subjects(args: argparse.Namespace) -> list[Subject]:
    with Progress(desc="Preparing pictures"):
        if args.images:
            return files(args.images, args.question, args.pictures)
        if args.small:
            subjects = scenes(args.pictures)
            return [replace(subject, answer="") for subject in subjects] if args.random else subjects
        return generated(args.pictures, args.size)


def _asked(args: argparse.Namespace, arms: Sequence[Arm]) -> list[Arm]:
    """All arms."""
    return [*([Arm(STOCK)] if args.stock else []), *arms]


@contextmanager
def _server(args: argparse.Namespace, *, stock: bool = False) -> Iterator[str]:
    """The URL of a server, started for the context unless the user named a running one."""
    if args.url:
        yield args.url.rstrip("/")
        return
    model, brings_code = model_of(args)
    options = [*QUIET_OPTIONS, *(SMALL if args.small else ()), *args.extra]
    if brings_code:
        options.append("--trust-remote-code")
    name = f"{args.name}{', stock vLLM' if stock else ''}"
    if stock:
        options = _without_pruning(options)
        environment = {"VLLM_PLUGINS": ""}
        with announced_server(
            name, ["--model", model, *options], command=STOCK_COMMAND, environment=environment
        ) as url:
            yield url
    else:
        with announced_server(name, [model, *options]) as url:
            yield url


def _without_pruning(options: Sequence[str]) -> list[str]:
    """Options of a server without those of pruning."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_pruning_options(parser)
    return parser.parse_known_args(options)[1]


def _measure(args: argparse.Namespace, arms: Sequence[Arm], subjects: Sequence[Subject], measured: Measured) -> str:
    """Fill ``measured``; returns the served name of the model.

    Raises:
        NoResult: requests of an arm fail, have no report, or none is pruned.
        ServerFailed: a server did not start.
    """
    levels = [Level(args.concurrency[0], new=False), *(Level(clients) for clients in args.concurrency)]
    measured.answers = {arm.name: [] for arm in _asked(args, arms)}
    measured.rounds = {level: {arm.name: [] for arm in _asked(args, arms)} for level in levels}
    if not args.stock:
        with _server(args) as url:
            return _turn(args, url, arms, subjects, measured, part=(0, 1))
    model = ""
    for number in range(TURNS):
        for stock in (True, False) if number % 2 else (False, True):
            with _server(args, stock=stock) as url:
                turn_arms = [Arm(STOCK)] if stock else arms
                model = _turn(args, url, turn_arms, subjects, measured, part=(number, TURNS))
    return model


def _turn(
    args: argparse.Namespace,
    url: str,
    arms: Sequence[Arm],
    subjects: Sequence[Subject],
    measured: Measured,
    part: tuple[int, int],
) -> str:
    """Measure arms on a server: the answers (which also warm it up), then the rounds of this part (number, of all)."""
    try:
        model = served_model(url)
    except ServerMissing as error:
        raise NoResult(f"{error}; expected a server started by `vtprune serve`") from error
    clients = min(4, args.concurrency[-1])
    again = [arm for arm in arms if arm.name == OFF]
    with (
        connect(url, timeout=TIMEOUT) as client,
        Progress(desc="Answers", total=(len(arms) + len(again)) * len(subjects), unit="requests") as progress,
    ):
        asker = Asker(partial(ask, client), model, args.max_tokens, progress.update, uuid.uuid4().hex)
        for arm in arms:
            measured.answers[arm.name] = asker.answers(arm, subjects, clients)
        for arm in again:
            measured.again = asker.answers(arm, subjects, clients, copy="again")
    if wrong := summary.refusals(arms, measured.answers):
        raise NoResult("\nvtprune bench: ".join(wrong))
    with connect(url, timeout=TIMEOUT) as client:
        for number, level in enumerate(measured.rounds, 1):
            name = f"{number} of {len(measured.rounds)}, {level}"
            _level(args, replace(asker, send=partial(ask, client)), name, level, arms, subjects, measured, part)
    return model


def _level(
    args: argparse.Namespace,
    asker: Asker,
    name: str,
    level: Level,
    arms: Sequence[Arm],
    subjects: Sequence[Subject],
    measured: Measured,
    part: tuple[int, int],
) -> None:
    """Measure arms at a level, under a name for the progress."""
    rounds = level.rounds(args.requests)
    started = time.monotonic()
    first, last = (rounds * number // part[1] for number in (part[0], part[0] + 1))
    by_arm = measured.rounds[level]
    with Progress(desc=name, total=(last - first) * len(arms) * level.block, unit="requests") as progress:
        asker = replace(asker, progress=progress.update)
        number = first
        while number < last:
            for arm in turn(arms, number):
                by_arm[arm.name].append(asker.block(arm, level, number, subjects))
            number += 1
            if args.seconds and number == first + 1:  # as many rounds as there is time for
                fit = int(args.seconds / part[1] / (time.monotonic() - started))
                last = first + max(level.rounds(1) // part[1], fit)
                progress.total = (last - first) * len(arms) * level.block


def _about(
    args: argparse.Namespace, argv: Sequence[str], model: str, subjects: Sequence[Subject], seconds: float
) -> dict[str, str]:
    """How it was measured, in words."""
    from importlib.metadata import packages_distributions, version

    from vllm_vtprune_evaluation.load.machine import machine

    with Progress(desc="Describing the machine"):
        described = machine()
    sent: dict[str, Any] = {arm.name: arm.pruning for arm in args.presets}
    return {
        "command": shlex.join(["vtprune", "bench", *argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "duration": f"{seconds:.0f} s",
        "model": model,
        "weights": "random" if args.random else "of the model",
        "policies": json.dumps(sent),
        "pictures": f"{len(subjects)}, {'from ' + str(args.images) if args.images else 'generated'}",
        "machine": ", ".join(f"{name}: {value}" for name, value in described.items()),
        "versions": ", ".join(
            [
                f"vllm-vtprune {__version__}",
                *(f"{name} {version(name)}" for name in set(packages_distributions()["vllm"])),
            ]
        ),
    }

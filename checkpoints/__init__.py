"""Checkpoints without a download: the trained model, and random ones of every family, made on the spot."""

import hashlib
import os
import pkgutil
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vllm_vtprune.families import FAMILIES

DEFAULT = "llava"

TRAINED = Path(__file__).parent / "model"
"""The model that comes with the package: of LLaVA's architecture, trained on scenes by `python -m training`."""

WITH_CODE = frozenset({"internvl_chat"})
"""Families whose checkpoints hold code that reads their config; vLLM runs it with ``trust_remote_code`` alone."""

Weights: TypeAlias = Literal["trained", "random"]

RANDOM_WEIGHTS = (
    "Random weights: answers and the choice of tokens mean nothing; speed and the number of tokens kept do."
)
"""Said above whatever a checkpoint with random weights gives."""


def weights_of(model: str | None, family: str) -> Weights | None:
    """What the weights are of the checkpoint that is taken; None for a user's, of which nothing is known.

    Args:
        model: the user's, if one is named.
        family: whose checkpoint is taken otherwise.
    """
    if model is not None:
        return None
    return "trained" if family == DEFAULT else "random"


def write_checkpoint(family: str, directory: Path, **options: Any) -> Path:
    """Write a random checkpoint of one of `FAMILIES` into `directory`, with the options of `Writer`, and return it."""
    written: Path = pkgutil.resolve_name(f"{__name__}.{family}:write_{family}_checkpoint")(directory, **options)
    return written


def embedded_checkpoint(family: str = DEFAULT) -> Path:
    """What is served and shown where no model is named: `TRAINED`, or of other families a random `tiny_checkpoint`."""
    return TRAINED if family == DEFAULT else tiny_checkpoint(family)


def tiny_checkpoint(family: str = DEFAULT) -> Path:
    """The tiny random checkpoint of one of `FAMILIES`, built on first use and kept in the user's cache directory.

    The directory's name holds a digest of what it is built from, so a new version builds anew. Several processes may
    call this at once: each builds in a directory of its own, and the first to finish gives it its name.
    """
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-vtprune"
    target = cache / f"{family}-tiny-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=cache, prefix=".building-"))
        try:
            building.chmod(0o755)
            write_checkpoint(family, building)
            building.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


__all__ = [
    "DEFAULT",
    "FAMILIES",
    "RANDOM_WEIGHTS",
    "TRAINED",
    "WITH_CODE",
    "embedded_checkpoint",
    "tiny_checkpoint",
    "weights_of",
    "write_checkpoint",
]

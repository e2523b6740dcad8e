"""The project's environment variables, in one typed table.

Call a variable for its current value:

>>> from vllm_vtprune import envs
>>> envs.device()
'auto'
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. Call it for its value; unset and empty mean the default.

    Raises:
        ValueError: `parse` rejects the value; names the variable, the value and what is accepted.
    """

    name: str
    default: T
    parse: Callable[[str], T]  # raises ValueError for a value it does not accept
    accepts: str
    doc: str

    def __call__(self) -> T:
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise ValueError(f"{self.name}: {text!r} is not accepted; expected {self.accepts}.") from None


def _device(text: str) -> str:
    name = text.lower()
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise ValueError
    return name


def _size(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _limit(text: str) -> float:
    value = _size(text)
    if value == 0:
        raise ValueError
    return value


def _placement(text: str) -> str:
    if text not in ("auto", "api", "engine"):
        raise ValueError
    return text


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


any_vllm = Variable(
    name="VTPRUNE_ANY_VLLM",
    default=False,
    parse=_switch,
    accepts="0 or 1",
    doc="1: run with a vLLM version that was not tested.",
)
device = Variable(
    name="VTPRUNE_DEVICE",
    default="auto",
    parse=_device,
    accepts="auto, cpu, cuda or cuda:INDEX",
    doc="Where images are encoded outside the engine. auto: the first GPU of its engine, or the CPU with vLLM's CPU "
    "build. If that GPU is unknown, the server refuses to start and asks for cuda:INDEX.",
)
feature_cache_gb = Variable(
    name="VTPRUNE_FEATURE_CACHE_GB",
    default=2.0,
    parse=_size,
    accepts="a number of GiB, 0 or more",
    doc="Main memory for cached visual features in each process that encodes, in GiB (LLaVA-1.5-7B: about 6 MiB per "
    "image), and as much again in each API process for preprocessed images whose tokens the engine selects. 0: no "
    "caches.",
)
report_table_size = Variable(
    name="VTPRUNE_REPORT_TABLE_SIZE",
    default=65536,
    parse=_count,
    accepts="a whole number of entries, 1 or more",
    doc="Reports that each API process remembers, so that a repeated image is still reported in full. Set it to at "
    "least the number of images in vLLM's processor cache.",
)
placement = Variable(
    name="VTPRUNE_PLACEMENT",
    default="auto",
    parse=_placement,
    accepts="auto, api or engine",
    doc="Where tokens are selected. engine: in the engine's encoder step, without a vision encoder in the API process; "
    "policies that need one are refused. api: in the API process. auto: in the engine where it can follow the policy. "
    "`vtprune serve` sets it from --pruning-placement.",
)
load_format = Variable(
    name="VTPRUNE_LOAD_FORMAT",
    default="auto",
    parse=str,
    accepts="a load format of vLLM",
    doc="How vLLM loads the vision encoder outside the engine; dummy: random weights. With any other format, word "
    "embeddings are read from *.safetensors. `vtprune serve` sets it from --load-format; with LLM(load_format=...), "
    "set it yourself.",
)
download_dir: Variable[Path | None] = Variable(
    name="VTPRUNE_DOWNLOAD_DIR",
    default=None,
    parse=Path,
    accepts="a directory",
    doc="Where to download the weights of the vision encoder outside the engine. Default: the hub's cache. `vtprune "
    "serve` sets it from --download-dir; with LLM(download_dir=...), set it yourself.",
)
encoder_threads = Variable(
    name="VTPRUNE_ENCODER_THREADS",
    default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    parse=_count,
    accepts="a whole number of threads, 1 or more",
    doc="CPU threads of the vision encoder, if it runs on the CPU. Default: every core that the process may use.",
)
max_image_mb = Variable(
    name="VTPRUNE_MAX_IMAGE_MB",
    default=32.0,
    parse=_limit,
    accepts="a number of MiB above 0",
    doc="Largest image file that the server accepts, in MiB.",
)
max_image_megapixels = Variable(
    name="VTPRUNE_MAX_IMAGE_MEGAPIXELS",
    default=100.0,
    parse=_limit,
    accepts="a number of megapixels above 0",
    doc="Largest image that the server decodes, in millions of pixels (3 bytes of memory each while it is decoded).",
)
max_image_aspect = Variable(
    name="VTPRUNE_MAX_IMAGE_ASPECT",
    default=512,
    parse=_count,
    accepts="a whole number, 1 or more",
    doc="Longest side of an image, as a multiple of its shorter side. CLIP's preprocessing scales the shorter side to "
    "the encoder's size before it crops: a line of 10,000 x 1 pixels would cost seconds and gigabytes.",
)
fetch_private_addresses = Variable(
    name="VTPRUNE_FETCH_PRIVATE_ADDRESSES",
    default=False,
    parse=_switch,
    accepts="0 or 1",
    doc="1: allowed hosts may have private, loopback or link-local addresses.",
)

VARIABLES: tuple[Variable[Any], ...] = tuple(value for value in globals().values() if isinstance(value, Variable))

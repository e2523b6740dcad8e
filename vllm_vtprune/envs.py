"""The project's environment variables, in one typed table.

Each variable is an object that reads itself when called, so `envs.device()` is always the process's current value:

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
from typing import Generic, TypeVar

__all__ = [
    "VARIABLES",
    "Variable",
    "any_vllm",
    "device",
    "download_dir",
    "feature_cache_gb",
    "fetch_private_addresses",
    "load_format",
    "max_image_aspect",
    "max_image_mb",
    "max_image_megapixels",
    "report_table_size",
    "tower_threads",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable. Call it for its value; unset and empty mean the default.

    Raises ValueError, naming the variable, the value and what is accepted, where `parse` refuses the value.
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
            raise ValueError(f"{self.name}={text!r} is not valid: expected {self.accepts}") from None


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


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError
    return text == "1"


any_vllm = Variable(
    name="VTPRUNE_ANY_VLLM",
    default=False,
    parse=_switch,
    accepts="0 or 1",
    doc="1: also run with a version of vLLM that this package was not tested with.",
)
device = Variable(
    name="VTPRUNE_DEVICE",
    default="auto",
    parse=_device,
    accepts="auto, cpu, cuda or cuda:INDEX",
    doc="Where the API process computes visual features, with vLLM's code. auto: on the first GPU of its engine; on "
    "the CPU where vLLM runs on CPUs, and only there. Where that GPU is not known, the server does not start, and asks "
    "for cuda:INDEX.",
)
feature_cache_gb = Variable(
    name="VTPRUNE_FEATURE_CACHE_GB",
    default=2.0,
    parse=_size,
    accepts="a number of GiB, 0 or more",
    doc="Memory for cached visual features in each API process, in GiB (an image of LLaVA-1.5-7B takes about 6 MiB). "
    "0: no cache.",
)
report_table_size = Variable(
    name="VTPRUNE_REPORT_TABLE_SIZE",
    default=65536,
    parse=_count,
    accepts="a whole number of entries, 1 or more",
    doc="How many plan reports each API process remembers, so that a repeated request still reports in full. At least "
    "as many as vLLM's processor cache holds images.",
)
load_format = Variable(
    name="VTPRUNE_LOAD_FORMAT",
    default="auto",
    parse=str,
    accepts="a load format of vLLM",
    doc="How vLLM loads the API process's vision encoder: dummy for random weights; with any other format, the "
    "embeddings of words are read from *.safetensors. `vtprune serve` sets it to its own --load-format; set it "
    "yourself beside LLM(load_format=...).",
)
download_dir: Variable[Path | None] = Variable(
    name="VTPRUNE_DOWNLOAD_DIR",
    default=None,
    parse=Path,
    accepts="a directory",
    doc="Where weights of a model on a hub are downloaded to, for the vision tower. Default: the hub's own cache. "
    "`vtprune serve` sets it to its own --download-dir; set it yourself beside LLM(download_dir=...).",
)
tower_threads = Variable(
    name="VTPRUNE_TOWER_THREADS",
    default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    parse=_count,
    accepts="a whole number of threads, 1 or more",
    doc="CPU threads of one vision tower, where it runs on the CPU. Default: every core this process may run on.",
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
    doc="Largest image that the server decodes, in millions of pixels (3 bytes of memory each, while it is decoded).",
)
max_image_aspect = Variable(
    name="VTPRUNE_MAX_IMAGE_ASPECT",
    default=512,
    parse=_count,
    accepts="a whole number, 1 or more",
    doc="How many times its shorter side an image's longer side may be. CLIP's preprocessing scales the shorter side "
    "to the encoder's size before it crops, so that a line of 10,000 x 1 pixels would cost seconds and gigabytes.",
)
fetch_private_addresses = Variable(
    name="VTPRUNE_FETCH_PRIVATE_ADDRESSES",
    default=False,
    parse=_switch,
    accepts="0 or 1",
    doc="1: images may also be fetched from allowed hosts at private, loopback and link-local addresses.",
)

VARIABLES: tuple[Variable[str] | Variable[float] | Variable[int] | Variable[bool] | Variable[Path | None], ...] = (
    any_vllm,
    device,
    download_dir,
    feature_cache_gb,
    fetch_private_addresses,
    load_format,
    max_image_aspect,
    max_image_mb,
    max_image_megapixels,
    report_table_size,
    tower_threads,
)

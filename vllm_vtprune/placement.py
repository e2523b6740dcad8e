"""Where an API process encodes images, and how much of a GPU's memory it needs for that.

Pure: nothing is asked of the machine or of vLLM, whose facts come as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from vllm_vtprune.tower import TowerError

__all__ = ["Footprint", "Process", "Reservation", "allocator_fraction", "device_for", "most_on_one_gpu", "reserve"]

GIB = 1024**3
GPU_PLATFORMS = ("cuda", "rocm")
"""vLLM's platforms on which torch calls the GPU ``cuda``."""

CONTEXT = 640 * 1024**2
"""Bytes that a process takes on a GPU before its first tensor: driver, CUDA context, cuBLAS. An estimate."""
LEAST_WORK = 256 * 1024**2
"""Bytes beside context and weights, below which not even small images can be expected to fit."""
SLACK = 1.1
"""What torch's allocator holds, as a multiple of what is used of it at most."""
SHARE = 0.1
"""Of a GPU: most that is taken for encoding unasked, unless the least is more. Large images may need more, but a model
that fills the GPU would not start with that."""


# --- Where --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """What an API process knows of itself, of its machine, and of the engines there.

    Attributes:
        platform: vLLM's, in small letters: cuda, rocm, cpu, xpu, tpu, ...
        visible: the GPUs that torch sees in this process, in torch's order, by any ids that `assigned` uses too.
        rank: of this process among the API processes of its server.
        engines: how many run on this machine; 0 on one that runs API processes alone.
        first_engine: rank of the first of them among all engines of this machine.
        gpus: GPUs that one engine has on this machine; None where that is not known.
        assigned: the GPUs of all engines of this machine, in the order of their ranks; None: those that are visible.
        ray: whether Ray chooses the engines' GPUs, so that `assigned` and ranks say nothing.
    """

    platform: str
    visible: tuple[int, ...] = ()
    rank: int = 0
    engines: int = 1
    first_engine: int = 0
    gpus: int | None = 1
    assigned: tuple[int, ...] | None = None
    ray: bool = False


def device_for(asked: str, process: Process) -> str:
    """Where a process encodes: on the first GPU of the engine of its rank, where vLLM runs on GPUs.

    vLLM's code encodes, which runs on vLLM's platform alone. Several API processes take turns over the engines, so that
    no GPU has more of them than it must.

    Args:
        asked: auto, cpu, cuda or cuda:INDEX.
        process: who asks.

    Returns:
        A device for torch: cpu or cuda:INDEX.

    Raises:
        TowerError: the device is not on vLLM's platform, not visible, or unknown.
    """
    if process.platform == "cpu":
        if asked not in ("auto", "cpu"):
            raise _wrong(f"this build of vLLM encodes images on the CPU, not on {asked}", "auto")
        return "cpu"
    if process.platform not in GPU_PLATFORMS:
        raise TowerError(
            f"images cannot be encoded on vLLM's platform {process.platform!r}; expected {', '.join(GPU_PLATFORMS)} or "
            "cpu: a GPU that vLLM finds, or vLLM's CPU build"
        )
    if not process.visible:
        raise TowerError("this process sees no GPU to encode images on; expected one in CUDA_VISIBLE_DEVICES")
    if asked == "cpu":
        raise _wrong("this build of vLLM encodes images on GPUs, not on the CPU", "auto or cuda:INDEX")
    if asked in ("auto", "cuda"):
        return f"cuda:{_gpu(process)}"
    if int(asked.partition(":")[2]) >= len(process.visible):
        raise _wrong(f"{asked} does not exist: this process sees {len(process.visible)} GPUs", "auto or another index")
    return asked


def _gpu(process: Process) -> int:
    """Index among the visible GPUs of the first one of this process's engine."""
    if process.engines == 0:
        raise _wrong("no engine runs on this machine, so no GPU is known to be free", "cuda:INDEX")
    engine = process.first_engine + process.rank % process.engines
    if process.gpus is None:
        if engine:
            raise _wrong(f"the GPU of data-parallel rank {engine} is unknown here", "cuda:INDEX")
        return 0
    first = engine * process.gpus
    if process.ray:
        if len(process.visible) > process.engines * process.gpus:
            raise _wrong(
                f"Ray chose the engine's GPU among {len(process.visible)} visible ones, and which is unknown here",
                "cuda:INDEX",
            )
        return first % len(process.visible)
    gpus = process.visible if process.assigned is None else process.assigned
    if first >= len(gpus) or gpus[first] not in process.visible:
        raise _wrong(
            f"GPU {gpus[first] if first < len(gpus) else first} of engine {engine} is not visible to this process, "
            f"which sees {len(process.visible)}",
            "cuda:INDEX",
        )
    return process.visible.index(gpus[first])


def _wrong(problem: str, answer: str) -> TowerError:
    return TowerError(f"{problem}; set VTPRUNE_DEVICE to {answer}")


def most_on_one_gpu(asked: str, processes: Sequence[Process]) -> int:
    """How many API processes of a server encode on one GPU of its engines, at most; 0 where none does.

    Args:
        asked: as `device_for` takes it.
        processes: all API processes of the server on this machine, which differ in their rank.

    Raises:
        TowerError: as `device_for` does.
    """
    devices = [device_for(asked, process) for process in processes]
    shared = {f"cuda:{index}" for process in processes for index in _engine_gpus(process)}
    return max((devices.count(device) for device in shared), default=0)


def _engine_gpus(process: Process) -> list[int]:
    """Indices among the visible GPUs of those that engines of this machine have, as far as that is known."""
    gpus = process.visible if process.assigned is None else process.assigned
    if process.gpus is not None and not process.ray:
        first = process.first_engine * process.gpus
        gpus = gpus[first : first + process.engines * process.gpus]
    return [process.visible.index(gpu) for gpu in gpus if gpu in process.visible]


# --- How much -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """GPU memory of one API process, in bytes.

    Attributes:
        weights: of encoder and projector.
        encoding: the most that a batch of the largest images takes while it is encoded.
        selection: the most that choosing tokens of the largest image takes.
        held: features that stay there between the two.
    """

    weights: int
    encoding: int
    selection: int
    held: int = 0

    @property
    def least(self) -> int:
        """What the process needs to encode anything at all."""
        return CONTEXT + self.weights + LEAST_WORK

    @property
    def total(self) -> int:
        """What it needs for the largest images, which are encoded and chosen from at the same time."""
        return CONTEXT + self.weights + max(LEAST_WORK, int(SLACK * (self.encoding + self.selection + self.held)))


@dataclass(frozen=True)
class Reservation:
    """Memory that every engine leaves free on each of its GPUs.

    Attributes:
        gib: of all API processes that encode on one GPU together, in GiB.
        warning: what will not fit; empty where everything does.
    """

    gib: float
    warning: str = ""


def reserve(need: Footprint, *, processes: int, card: int, given: float | None = None) -> Reservation:
    """How much to reserve for the encoders on a GPU.

    All that they can need, but not more than `SHARE` of the GPU, unless the operator says how much.

    Args:
        need: of one API process.
        processes: how many encode on one GPU; 0 for nothing to reserve.
        card: the GPU's memory in bytes.
        given: the operator's ``--mm-ipc-gpu-memory-gb``, in GiB; None: unset.

    Raises:
        TowerError: it is too small for the weights.
    """
    if not processes:
        return Reservation(given or 0.0)
    least, most = processes * need.least, processes * need.total
    if given is None:
        reserved = max(least, min(most, int(SHARE * card)))
        reason = f"{_gib(reserved):g} GiB of the GPU are reserved for the vision encoder"
    else:
        reserved = int(given * GIB)
        reason = f"--mm-ipc-gpu-memory-gb={given:g} reserves less than the vision encoder may need"
        if reserved < least:
            raise TowerError(
                f"--mm-ipc-gpu-memory-gb={given:g} does not hold {_encoders(processes)}; expected {_gib(least):g} or "
                f"more, and {_gib(most):g} for the largest images"
            )
    gib = _gib(reserved) if given is None else given
    if reserved >= most:
        return Reservation(gib)
    return Reservation(
        gib,
        f"{reason}: the largest images need {_gib(most):g} GiB with {_encoders(processes)}, and fail if less is free. "
        f"Set --mm-ipc-gpu-memory-gb to {_gib(most):g}, or fewer pixels in --mm-processor-kwargs.",
    )


def _encoders(processes: int) -> str:
    return "the vision encoder" if processes == 1 else f"the vision encoders of {processes} API processes"


def _gib(size: int) -> float:
    """In GiB, rounded up to hundredths."""
    return ceil(size / GIB * 100) / 100


def allocator_fraction(share: float, card: int) -> float:
    """The part of a GPU's memory that torch may allocate in one API process.

    Args:
        share: bytes that the process may take of the GPU.
        card: the GPU's memory in bytes.
    """
    return min(1.0, max(share - CONTEXT, LEAST_WORK) / card)

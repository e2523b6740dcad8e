"""The devices on which images are encoded, by which processes, and the GPU memory that these need.

Pure functions of their arguments: reads neither the machine nor vLLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from vllm_vtprune.vision_encoder import EncoderError

GIB = 1024**3
GPU_PLATFORMS = ("cuda", "rocm")
"""vLLM's platforms whose device is called ``cuda`` in torch."""

CONTEXT = 640 * 1024**2
"""Estimated bytes that a process uses on a GPU before its first tensor: driver, CUDA context, cuBLAS."""
LEAST_WORK = 256 * 1024**2
"""Bytes besides context and weights without which even small images may not fit."""
SLACK = 1.1
"""Memory reserved by torch's allocator, as a multiple of the peak allocation."""
SHARE = 0.1
"""Largest fraction of a GPU reserved by default, unless `Footprint.least` is more. Large images may need more, but a
model that fills the GPU would not start with it."""


# --- Device -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """An API process, its GPUs, and the engines of its machine.

    Attributes:
        platform: vLLM's platform in lower case: cuda, rocm, cpu, xpu, tpu, ...
        visible: ids of the GPUs that torch sees in this process, in torch's order; same kind of ids as `assigned`.
        rank: rank of this process among its server's API processes.
        engines: engines of this server on this machine; 0 if it runs API processes only.
        first_engine: local rank of the first of these engines.
        gpus: GPUs per engine on this machine; None if unknown.
        assigned: ids of all engines' GPUs on this machine, in rank order; None: the visible GPUs.
        ray: whether Ray places the engines, so that `assigned` and ranks do not tell their GPUs.
    """

    platform: str
    visible: tuple[int, ...] = ()
    rank: int = 0
    engines: int = 1
    first_engine: int = 0
    gpus: int | None = 1
    assigned: tuple[int, ...] | None = None
    ray: bool = False


def device_for(requested: str, process: Process) -> str:
    """The device on which a process encodes images: the CPU, or the first GPU of the engine of its rank.

    Must be on vLLM's platform, because vLLM's code encodes. API processes are spread evenly over the engines.

    Args:
        requested: auto, cpu, cuda or cuda:INDEX.
        process: the API process.

    Returns:
        A torch device: cpu or cuda:INDEX.

    Raises:
        EncoderError: the device is not on vLLM's platform, not visible, or unknown.
    """
    if process.platform == "cpu":
        if requested not in ("auto", "cpu"):
            raise _device_error(f"this build of vLLM encodes images on the CPU, not on {requested}", "auto")
        return "cpu"
    if process.platform not in GPU_PLATFORMS:
        raise EncoderError(
            f"images cannot be encoded on vLLM's platform {process.platform!r}; expected {', '.join(GPU_PLATFORMS)} or "
            "cpu: a GPU that vLLM finds, or vLLM's CPU build"
        )
    if not process.visible:
        raise EncoderError("this process sees no GPU to encode images on; expected one in CUDA_VISIBLE_DEVICES")
    if requested == "cpu":
        raise _device_error("this build of vLLM encodes images on GPUs, not on the CPU", "auto or cuda:INDEX")
    if requested in ("auto", "cuda"):
        return f"cuda:{_gpu(process)}"
    visible = len(process.visible)
    if int(requested.partition(":")[2]) >= visible:
        raise _device_error(f"{requested} does not exist: this process sees {visible} GPUs", "auto or another index")
    return requested


def _gpu(process: Process) -> int:
    """Index, among the visible GPUs, of the first GPU of this process's engine."""
    if process.engines == 0:
        raise _device_error("no engine runs on this machine, so no GPU is known to be free", "cuda:INDEX")
    engine = process.first_engine + process.rank % process.engines
    if process.gpus is None:
        if engine:
            raise _device_error(f"the GPU of data-parallel rank {engine} is unknown here", "cuda:INDEX")
        return 0
    first = engine * process.gpus
    if process.ray:
        if len(process.visible) > process.engines * process.gpus:
            raise _device_error(
                f"Ray chose the engine's GPU among {len(process.visible)} visible ones, and which is unknown here",
                "cuda:INDEX",
            )
        return first % len(process.visible)
    gpus = process.visible if process.assigned is None else process.assigned
    if first >= len(gpus) or gpus[first] not in process.visible:
        raise _device_error(
            f"GPU {gpus[first] if first < len(gpus) else first} of engine {engine} is not visible to this process, "
            f"which sees {len(process.visible)}",
            "cuda:INDEX",
        )
    return process.visible.index(gpus[first])


def _device_error(problem: str, accepted: str) -> EncoderError:
    return EncoderError(f"{problem}; set VTPRUNE_DEVICE to {accepted}")


@dataclass(frozen=True)
class EncoderPlace:
    """A device on which a server encodes images.

    Attributes:
        device: a torch device: cpu or cuda:INDEX.
        with_engine: whether an engine uses this GPU or may; then encoders use reserved memory only.
        processes: processes that hold an encoder there.
        clients: API processes that each of them serves.
    """

    device: str
    with_engine: bool = False
    processes: int = 1
    clients: int = 1


def encoder_places(requested: str, processes: Sequence[Process], *, shared: bool) -> list[EncoderPlace]:
    """The devices on which a server encodes images.

    Args:
        requested: see `device_for`.
        processes: all API processes of the server on this machine.
        shared: whether one encoder process per device serves all its API processes; else each has its own encoder.

    Raises:
        EncoderError: see `device_for`.
    """
    devices = [device_for(requested, process) for process in processes]
    of_engines = {f"cuda:{index}" for process in processes for index in _engine_gpus(process)}
    return [
        EncoderPlace(device, device in of_engines, *((1, count) if shared else (count, 1)))
        for device, count in Counter(devices).items()
    ]


def _engine_gpus(process: Process) -> list[int]:
    """Indices, among the visible GPUs, of the GPUs that engines of this machine use or may use."""
    gpus = process.visible if process.assigned is None else process.assigned
    if process.gpus is not None and not process.ray:
        first = process.first_engine * process.gpus
        gpus = gpus[first : first + process.engines * process.gpus]
    return [process.visible.index(gpu) for gpu in gpus if gpu in process.visible]


# --- Memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """GPU memory of one process that encodes, in bytes.

    Attributes:
        weights: encoder and projector.
        encoding: peak while a batch of the largest images is encoded.
        selection: peak while tokens of the largest image are selected.
        held: features that stay on the GPU between the two.
    """

    weights: int
    encoding: int
    selection: int
    held: int = 0

    def for_clients(self, clients: int) -> Footprint:
        """The same for a process that serves several API processes, each of which plans one image at a time."""
        return replace(self, selection=clients * self.selection)

    @property
    def least(self) -> int:
        """Bytes needed to encode any image."""
        return CONTEXT + self.weights + LEAST_WORK

    @property
    def total(self) -> int:
        """Bytes needed to encode and select from the largest images at the same time."""
        return CONTEXT + self.weights + max(LEAST_WORK, int(SLACK * (self.encoding + self.selection + self.held)))


@dataclass(frozen=True)
class Reservation:
    """Memory that every engine leaves free on each of its GPUs.

    Attributes:
        gib: GiB for all processes that encode on one GPU.
        warning: says what will not fit; empty if everything fits.
    """

    gib: float
    warning: str = ""


def reserve(need: Footprint, *, processes: int, card: int, operator_gib: float | None = None) -> Reservation:
    """The GPU memory to reserve for vision encoders: what they may need, up to `SHARE` of the GPU.

    Args:
        need: memory of one process that encodes.
        processes: processes that encode on the GPU.
        card: the GPU's memory in bytes.
        operator_gib: the operator's ``--mm-ipc-gpu-memory-gb`` in GiB, which takes precedence; None: unset.

    Raises:
        EncoderError: the operator's value is too small for the weights.
    """
    least, most = processes * need.least, processes * need.total
    if operator_gib is None:
        reserved = max(least, min(most, int(SHARE * card)))
        reason = f"{_gib(reserved):g} GiB of the GPU are reserved for the vision encoder"
    else:
        reserved = int(operator_gib * GIB)
        reason = f"--mm-ipc-gpu-memory-gb={operator_gib:g} reserves less than the vision encoder may need"
        if reserved < least:
            raise EncoderError(
                f"--mm-ipc-gpu-memory-gb={operator_gib:g} does not hold {_encoders(processes)}; "
                f"expected {_gib(least):g} or more, and {_gib(most):g} for the largest images"
            )
    gib = _gib(reserved) if operator_gib is None else operator_gib
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
    """Bytes in GiB, rounded up to hundredths."""
    return ceil(size / GIB * 100) / 100


def allocator_fraction(share: float, card: int) -> float:
    """The fraction of a GPU's memory that torch may allocate in one process that encodes.

    Args:
        share: bytes of the GPU that the process may use.
        card: the GPU's memory in bytes.
    """
    return min(1.0, max(share - CONTEXT, LEAST_WORK) / card)

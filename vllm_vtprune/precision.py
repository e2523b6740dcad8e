"""How exact products of float32 matrices are."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator

import torch

_lock = threading.Lock()
_inside = 0  # how often the context is entered now, by all threads
_before: tuple[str | None, str, str] = (None, "none", "none")


class full_float32(ContextDecorator):
    """Within this context, or a function that it decorates, float32 products are float32: not TF32, nor bfloat16.

    PyTorch has this setting once for the process, not for each thread or call. The first thread to enter changes it,
    and the last to leave restores it. So no thread inside ever computes in less than float32, whatever the others do;
    float32 products of threads outside are in full float32 too for that time: no less exact, and on a GPU slower. What
    a thread outside sets in the meantime is undone.
    """

    def __enter__(self) -> None:
        global _inside, _before
        with _lock:
            if _inside == 0:
                _before = _setting()
                _set("highest" if _before[0] else None, "ieee", "ieee")
            _inside += 1

    def __exit__(self, *exception: object) -> None:
        global _inside
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(*_before)


def _setting() -> tuple[str | None, str, str]:
    """The precision of all float32 products, None where it was set for some of them alone; a GPU's; a CPU's."""
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's older setting and its newer ones contradict each other
        overall = None
    return overall, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def _set(overall: str | None, on_gpu: str, on_cpu: str) -> None:
    if overall is not None:  # else who reads the older setting in the meantime gets an error
        torch.set_float32_matmul_precision(overall)
    torch.backends.cuda.matmul.fp32_precision = on_gpu
    torch.backends.mkldnn.matmul.fp32_precision = on_cpu  # type: ignore[attr-defined]

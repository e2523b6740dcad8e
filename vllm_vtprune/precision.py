"""The precision of float32 matrix products."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator

import torch

_lock = threading.Lock()
_depth = 0  # times the context is entered, over all threads
_saved: tuple[str | None, str, str] = (None, "none", "none")


class full_float32(ContextDecorator):
    """Within this context or a decorated function, float32 products use full float32, not TF32 or bfloat16.

    PyTorch's setting is per process. The first thread to enter changes it, the last to leave restores it. Meanwhile,
    other threads also compute in full float32 (slower on a GPU), and changes that they make to the setting are lost.
    """

    def __enter__(self) -> None:
        global _depth, _saved
        with _lock:
            if _depth == 0:
                _saved = _setting()
                _set("highest" if _saved[0] else None, "ieee", "ieee")
            _depth += 1

    def __exit__(self, *exception: object) -> None:
        global _depth
        with _lock:
            _depth -= 1
            if _depth == 0:
                _set(*_saved)


def _setting() -> tuple[str | None, str, str]:
    """Precision overall (None if torch's older and newer settings contradict), on GPUs, and on CPUs."""
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # the settings contradict
        overall = None
    return overall, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


def _set(overall: str | None, on_gpu: str, on_cpu: str) -> None:
    if overall is not None:  # keeps the older setting readable meanwhile
        torch.set_float32_matmul_precision(overall)
    torch.backends.cuda.matmul.fp32_precision = on_gpu
    torch.backends.mkldnn.matmul.fp32_precision = on_cpu  # type: ignore[attr-defined]

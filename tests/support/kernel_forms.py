"""Which form of a kernel Triton would compile for a call, found without a GPU."""

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_vtprune.selectors.pivots_triton import TILE, WIDTH


def form_of(kernel: Any) -> Callable[..., str]:
    """A function of the kernel's arguments, but for its two constants, that tells forms apart."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    return lambda *arguments: str(bind(*arguments, WIDTH, TILE)[1])

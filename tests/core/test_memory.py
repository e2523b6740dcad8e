"""What a plan needs at most at one time, on a CPU. On a GPU: `test_gpu_form`.

Counted are the tensors that PyTorch's operators return; what they need within themselves is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.selectors import SELECTORS

COMPARE_ALL = {"divprune", "scope", "cover", "vispruner"}
"""Methods with one matrix of tokens by tokens, in float32; tome has a quarter of one, prumerge what it keeps by all."""


class Held(TorchDispatchMode):
    """Bytes of the tensors made while it is entered, at most at one time, and the numbers of the largest in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest_float64 = 0
        self._holders: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._holders[storage.data_ptr()] += 1
                self._bytes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(tensor, self._let_go, storage.data_ptr())
                if tensor.dtype == torch.float64:
                    self.largest_float64 = max(self.largest_float64, tensor.numel())
        self.peak = max(self.peak, sum(self._bytes.values()))
        return out

    def _let_go(self, pointer: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            del self._bytes[pointer]


def most(method: str, n: int, d: int) -> float:
    """Bytes that a method may need for ``n`` tokens, both of whose features are ``d`` wide, a ninth of them kept."""
    matrix = 1.0 if method in COMPARE_ALL else 0.25 if method == "tome" else 0.12
    square = 2.1 * 8 * min(n, d) ** 2 if method == "leverage" else 0
    return 4 * n * n * matrix + 8 * 4 * n * d + square + 2**21


@pytest.mark.parametrize(("n", "d"), [(1536, 64), (768, 1024)])
@pytest.mark.parametrize("method", SELECTORS)
def test_memory_of_a_method(method: str, n: int, d: int, record_property: Callable[[str, object], None]) -> None:
    generator = torch.Generator().manual_seed(n)
    encoder, embeds = torch.randn(2, n, d, generator=generator)
    features = VisualFeatures(
        encoder, embeds, (n // 32, 32),
        cls_attention=torch.rand(n, generator=generator), keys=torch.randn(n, 16, generator=generator),
    )  # fmt: skip
    policy = PruningPolicy.parse({"method": method, "budget": {"type": "tokens", "keep": n // 9}})
    with Held() as held:
        plan_tokens(features, policy, torch.randn(3, d, generator=generator))
    assert held.peak < most(method, n, d)
    assert held.largest_float64 <= max(n * d, 256 * n), "no matrix of tokens by tokens"
    record_property(f"{method}_megabytes_of_{n}_x_{d}", round(held.peak / 2**20, 1))

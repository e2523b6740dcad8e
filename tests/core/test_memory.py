"""What a plan needs at most at one time, on a CPU. On a GPU: `test_gpu_form`."""

from collections.abc import Callable

import pytest
import torch

from tests.support.held import Held
from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.selectors import SELECTORS

COMPARE_ALL = {"divprune", "scope", "cover", "vispruner"}
"""Methods with one matrix of tokens by tokens, in float32; tome has a quarter of one, prumerge what it keeps by all."""


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

"""What a plan's work grows with: no step of it takes time in the third power of the tokens.

Counted, not timed: the numbers that torch's operators read and write, and the operations of its matrix products. What
runs in NumPy is not counted (the drafts of `selectors.pivots`, whose size does not depend on the number of tokens).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.support.energy import energy_rank
from vllm_vtprune import PruningPlan, PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.selectors import SELECTORS

pytestmark = pytest.mark.verify

KEEP = 64
MOST = {"ranking": 2.3, "pairwise": 4.8, "greedy": 4.8}
"""Times as much work for twice the tokens, as many kept: N log N, N^2, N^2. In the third power it would be 8."""

PAGE, WIDTH = 10_000, 2048
"""A page in Qwen2.5-VL-3B: its tokens, and the width of both of its features."""


class Work(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        touched: numbers that operators read and wrote.
        largest: numbers of the largest tensor.
        factorised: the largest side of a matrix that was taken apart (eigenvalues, QR, Cholesky, triangular systems),
            by operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.touched = self.largest = 0
        self.factorised: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        sides = [min(tensor.shape) for tensor in tensors if tensor.ndim == 2]
        if "linalg" in name and "norm" not in name and sides:
            self.factorised[name] = max(*sides, self.factorised.get(name, 0))
        if name in ("index", "index_select"):  # reads no more than it gives
            self.touched += 2 * out.numel()
        elif not func.is_view:
            self.touched += sum(tensor.numel() for tensor in tensors)
        return out


def image(n: int, width: int = 64) -> VisualFeatures:
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randn(n, width, generator=generator)
    rows = next(rows for rows in range(int(n**0.5), 0, -1) if n % rows == 0)
    return VisualFeatures(
        encoder=tokens,
        embeds=tokens,
        grid=(rows, n // rows),
        cls_attention=torch.rand(n, generator=generator),
        keys=torch.randn(n, 16, generator=generator),
    )


def counted(work: Callable[[], Any]) -> tuple[Any, int, Work]:
    """What a call returns, how much it did, and what else is known of that."""
    with FlopCounterMode(display=False) as products, Work() as seen:
        result = work()
    return result, products.get_total_flops() + seen.touched, seen


@pytest.mark.parametrize("method", SELECTORS)
def test_a_method_grows_as_its_row_says(method: str, record_property: Callable[[str, object], None]) -> None:
    policy = PruningPolicy.parse({"method": method, "budget": {"type": "tokens", "keep": KEEP}})
    text = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))
    few, many = image(1024), image(2048)
    _, less, _ = counted(lambda: plan_tokens(few, policy, text))
    _, more, seen = counted(lambda: plan_tokens(many, policy, text))
    assert 1.5 < more / less < MOST[SELECTORS[method].cost]
    assert seen.largest <= 2048**2
    record_property(f"{method}_growth", round(more / less, 2))


@pytest.mark.parametrize("solver", ["auto", "exact", "rsvd"])
def test_the_energy_of_a_page_grows_with_its_tokens(solver: Any) -> None:
    """Nothing of it is larger than the features are wide, however many tokens there are."""
    half, whole = image(PAGE // 2, 512).encoder, image(PAGE, 512).encoder
    _, less, _ = counted(lambda: energy_rank(half, 0.99, solver))
    _, more, seen = counted(lambda: energy_rank(whole, 0.99, solver))
    assert 1.5 < more / less < 2.3
    assert seen.factorised
    assert max(seen.factorised.values()) <= 512
    assert seen.largest == PAGE * 512


@pytest.mark.parametrize("decay", [0.01, 0.5], ids=["flat", "steep"])
def test_a_page_is_planned(decay: float, record_property: Callable[[str, object], None]) -> None:
    """10,000 tokens, of whose features a few directions or most hold the energy: the rank is right to 1 %."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, WIDTH + 1) ** -decay
    tokens = torch.randn(PAGE, WIDTH, generator=generator) * scales
    features = VisualFeatures(encoder=tokens, embeds=tokens, grid=(100, 100))
    policy = PruningPolicy.parse({"budget": {"type": "energy", "threshold": 0.99}})
    plan: PruningPlan
    plan, _, seen = counted(lambda: plan_tokens(features, policy))
    assert plan.budget == pytest.approx(energy_rank(tokens, 0.99, "exact"), rel=0.01)
    assert len(plan.kept) == plan.budget < WIDTH
    assert max(seen.factorised.values()) <= WIDTH
    assert seen.largest <= PAGE * WIDTH, "no matrix of tokens by tokens"
    record_property(f"kept_of_{PAGE}_at_{decay}", plan.budget)
    record_property(f"seconds_at_{decay}", round(sum(plan.timings.values()), 1))

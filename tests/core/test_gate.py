"""The gate of ResPrune: bounded below, monotone, and nothing where the text says nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtprune.selectors.gate import GATES, LEAST_SPREAD, LEAST_WEIGHT, gate

COSINES = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40).map(torch.tensor)
ALPHAS = st.floats(0, 4)


@given(COSINES, ALPHAS)
def test_the_default_excludes_no_token(cosines: torch.Tensor, alpha: float) -> None:
    weights = gate(cosines, "minmax", alpha)
    assert weights.dtype == torch.float64
    assert float(weights.amax()) == 1.0
    assert float(weights.amin()) >= LEAST_WEIGHT**alpha * (1 - 1e-12)


@pytest.mark.parametrize("form", GATES)
@given(cosines=COSINES, alpha=ALPHAS)
def test_it_grows_with_the_cosine(form: str, cosines: torch.Tensor, alpha: float) -> None:
    weights = gate(cosines.sort().values, form, alpha)
    assert bool((weights.diff() >= 0).all())


@given(st.floats(-1, 1, width=32), st.integers(1, 40), ALPHAS)
def test_equal_cosines_weigh_one(cosine: float, count: int, alpha: float) -> None:
    assert gate(torch.full((count,), cosine), "minmax", alpha).tolist() == [1.0] * count


@pytest.mark.parametrize("level", [-0.9, 0.0, 0.4])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_it_shrinks_with_the_spread(level: float, share: float) -> None:
    cosines = level + share * LEAST_SPREAD * torch.linspace(0, 1, 5, dtype=torch.float64)
    assert float(gate(cosines, "minmax", 1.0).amin()) == pytest.approx(1 - (1 - LEAST_WEIGHT) * share)


def test_values() -> None:
    cosines = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    assert gate(cosines, "minmax", 1.0).tolist() == pytest.approx([0.1, 0.55, 1.0])
    assert gate(cosines, "minmax", 0.5).tolist() == pytest.approx([0.1**0.5, 0.55**0.5, 1.0])
    assert gate(cosines, "clip", 0.75).tolist() == pytest.approx([1e-6**0.75, 1e-6**0.75, 0.5**0.75])
    for form in GATES:
        assert gate(cosines, form, 0).tolist() == [1.0, 1.0, 1.0]

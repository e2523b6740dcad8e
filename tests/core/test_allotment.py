"""One budget for all images of a request, divided by their energies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vtprune.allotment import Energies, allot
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PolicyError, PruningPolicy, RatioBudget, TokensBudget
from vllm_vtprune.selectors.registry import METHODS

RESPRUNE = METHODS["resprune"]


def tokens(keep: int, min_tokens: int = 1) -> TokensBudget:
    return TokensBudget(keep=keep, scope="request", min_tokens=min_tokens)


def of_rank(rank: int, n: int = 60) -> Energies:
    """The energies of an image with a mean token and ``rank`` further directions of equal strength."""
    generator = torch.Generator().manual_seed(rank)
    directions, _ = torch.linalg.qr(torch.randn(40, rank + 1, generator=generator))
    weights, _ = torch.linalg.qr(torch.randn(n, rank + 1, generator=generator))
    scale = torch.tensor([30.0, *[1.0] * rank])
    features = (weights * scale) @ directions.T
    return Energies.of(VisualFeatures(encoder=features, embeds=torch.ones(n, 8), grid=(1, n)))


def energies(*values: float, n: int = 10) -> Energies:
    return Energies(n, ((1, n),), torch.tensor(values))


def test_the_strongest_directions_of_all_images_are_kept() -> None:
    images = [energies(9, 4, 3), energies(8, 7, 1, 0.5)]
    assert allot(tokens(2), images, RESPRUNE) == [1, 1]
    assert allot(tokens(3), images, RESPRUNE) == [1, 2]
    assert allot(tokens(5), images, RESPRUNE) == [3, 2]
    assert allot(tokens(7), images, RESPRUNE) == [3, 4]


def test_a_blank_page_leaves_its_share_to_a_chart() -> None:
    blank, chart = of_rank(0), of_rank(30)
    assert allot(tokens(24), [blank, chart], RESPRUNE) == [1, 23]
    assert allot(tokens(24, min_tokens=8), [blank, chart], RESPRUNE) == [8, 16]
    assert allot(tokens(24, min_tokens=16), [chart, blank], RESPRUNE) == [12, 12]


def test_what_no_image_has_energy_for_is_divided_evenly() -> None:
    assert allot(tokens(12), [energies(5, 1), energies(5)], RESPRUNE) == [6, 6]
    assert allot(tokens(50), [energies(5, 1), energies(5, n=20)], RESPRUNE) == [10, 20], "all tokens of both"


def test_a_ratio_counts_the_tokens_of_all_images() -> None:
    images = [energies(5, 1), energies(5, 4, 3, 2, n=30)]
    assert sum(allot(RatioBudget(keep=0.25, scope="request"), images, RESPRUNE)) == 10


def test_a_method_bounds_each_image() -> None:
    images = [of_rank(30, n=40), energies(5, n=40)]
    assert allot(tokens(40), images, METHODS["skip"]) == [20, 20]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.floats(0, 1e6), min_size=1, max_size=30)), min_size=1, max_size=5
    ),
    st.integers(1, 200),
    st.integers(1, 40),
)
def test_the_sum_is_the_budget(sizes: list[tuple[int, list[float]]], keep: int, min_tokens: int) -> None:
    images = [Energies(n, ((1, n),), torch.tensor(sorted(values, reverse=True))) for n, values in sizes]
    keep = max(keep, len(images))
    counts = allot(tokens(keep, min_tokens), images, RESPRUNE)
    assert sum(counts) == min(keep, sum(n for n, _ in sizes))
    least = min(min_tokens, keep // len(images))
    assert all(min(least, n) <= count <= n for count, (n, _) in zip(counts, sizes, strict=True))


def test_energies_are_those_of_a_full_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    features = VisualFeatures(torch.randn(50, 12, generator=generator), torch.ones(50, 8), grid=(5, 10))
    measured = Energies.of(features)
    assert (measured.num_tokens, measured.grids) == (50, ((5, 10),))
    assert torch.allclose(measured.energies, torch.linalg.svdvals(features.encoder).square(), rtol=1e-4)
    tiny = VisualFeatures(features.encoder * 1e-12, features.embeds)
    assert torch.allclose(Energies.of(tiny).energies, measured.energies * 1e-24, rtol=1e-4), "beyond float32's range"


def test_the_scope_belongs_to_fixed_budgets() -> None:
    with pytest.raises(PolicyError, match="scope belongs to budget type ratio or tokens"):
        PruningPolicy.parse({"budget": {"type": "energy", "scope": "request"}})
    with pytest.raises(PolicyError, match=r'min_tokens: 3 given, but only a budget of scope "request" uses min_tokens'):
        PruningPolicy.parse({"budget": {"type": "tokens", "keep": 9, "min_tokens": 3}})
    with pytest.raises(PolicyError, match=r'budget.scope: "request" needs features, but method resize') as raised:
        PruningPolicy.parse({"method": "resize", "budget": {"type": "tokens", "keep": 9, "scope": "request"}})
    assert raised.value.accepted == '"image"'


def test_the_scope_is_shown_only_where_it_is_used() -> None:
    policy = PruningPolicy.parse({"budget": {"type": "tokens", "keep": 9, "scope": "request"}})
    assert policy.dump()["budget"] == {"type": "tokens", "keep": 9, "scope": "request", "min_tokens": 16}
    image = PruningPolicy.parse({"budget": {"type": "tokens", "keep": 9, "scope": "image", "min_tokens": 16}})
    assert image.dump()["budget"] == {"type": "tokens", "keep": 9}
    assert image.selection_digest() != policy.selection_digest()

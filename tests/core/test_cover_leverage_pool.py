"""CoverPruner, leverage and pooling against their rules written down naively in float64, one token at a time."""

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vllm_vtprune import PruningPlan, PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.features import Tiles
from vllm_vtprune.selectors.leverage import RIDGE
from vllm_vtprune.selectors.pool import Pool
from vllm_vtprune.selectors.scope import SCOPE

SHAPES = {
    "rows": st.integers(1, 8),
    "columns": st.integers(1, 8),
    "share": st.floats(0, 1),
    "seed": st.integers(0, 9999),
}


def tokens_of(n: int, width: int, seed: int, common: float = 1.0) -> Tensor:
    """``(n, width)``, each a part of its own and ``common`` times one that all share."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator) + common * torch.randn(1, width, generator=generator)


def plan(method: str, features: VisualFeatures, k: int, text: Tensor | None = None, **fields: object) -> PruningPlan:
    budget = {"type": "tokens", "keep": k}
    return plan_tokens(features, PruningPolicy.parse({"method": method, "budget": budget, **fields}), text)


def order(method: str, tokens: Tensor, k: int, attention: Tensor | None = None, **fields: object) -> list[int]:
    features = VisualFeatures(tokens, tokens, cls_attention=attention)
    chosen: list[int] = plan(method, features, k, **fields).order.tolist()
    return chosen


# ---- cover


def cover(tokens: Tensor, importance: list[float], k: int) -> list[int]:
    apart = tokens.double() - tokens.double().mean(dim=0)
    cosines = (normalize(apart, dim=1) @ normalize(apart, dim=1).T).clamp(min=0)
    covered = torch.zeros(len(tokens), dtype=torch.float64)
    chosen: list[int] = []
    while len(chosen) < k:
        gains = (cosines - covered).clamp(min=0).sum(dim=1).tolist()
        left = [i for i in range(len(tokens)) if i not in chosen]
        chosen.append(max(left, key=lambda i, gains=gains: gains[i] * importance[i]))  # type: ignore[misc]
        covered = torch.maximum(covered, cosines[chosen[-1]])
    return chosen


@settings(max_examples=25)
@given(**SHAPES, common=st.sampled_from([0.0, 1.0, 30.0]), norm=st.booleans())
def test_cover_follows_its_rule(rows: int, columns: int, share: float, seed: int, common: float, norm: bool) -> None:
    n = rows * columns
    tokens, k = tokens_of(n, 120, seed, common), max(1, round(share * n))
    attention = torch.randn(n, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=0)
    if norm:
        expected = cover(tokens, tokens.double().norm(dim=1).tolist(), k)
        assert order("cover", tokens, k, attention, importance="norm") == expected
        assert order("cover", tokens, k) == expected, "without a CLS token"
    else:
        assert order("cover", tokens, k, attention) == cover(tokens, attention.double().tolist(), k)


def test_cover_at_the_size_of_llava() -> None:
    """What the tokens share is 99.9 % of their energy."""
    tokens = tokens_of(576, 256, seed=1, common=30.0)
    attention = torch.rand(576, generator=torch.Generator().manual_seed(1))
    assert order("cover", tokens, 64, attention) == cover(tokens, attention.double().tolist(), 64)


def test_cover_looks_past_what_all_tokens_share() -> None:
    tokens = tokens_of(48, 64, seed=0, common=0.0)
    tokens -= tokens.mean(dim=0)
    attention = torch.rand(48, generator=torch.Generator().manual_seed(0))
    shifted = tokens + 8.0
    assert order("cover", shifted, 20, attention) == order("cover", tokens, 20, attention)
    assert order("scope", shifted, 20, attention) != order("scope", tokens, 20, attention)


@given(kinds=st.lists(st.integers(0, 6), min_size=1, max_size=30), share=st.floats(0, 1), level=st.booleans())
def test_ties_of_cover_go_to_the_smallest_index(kinds: list[int], share: float, level: bool) -> None:
    """Every token has its opposite, so that their mean is exactly 0."""
    tokens = torch.cat([torch.eye(7)[kinds], -torch.eye(7)[kinds]])
    attention = torch.full((len(tokens),), 0.5) if level else torch.tensor(kinds * 2) / 8 + 0.125
    k = max(1, round(share * len(tokens)))
    assert order("cover", tokens, k, attention) == cover(tokens, attention.double().tolist(), k)


@pytest.mark.parametrize("method", ["cover", "leverage"])
@pytest.mark.parametrize("n", [1, 7, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_tokens_are_kept_from_the_first_on(method: str, n: int, dtype: torch.dtype) -> None:
    token = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tokens in (token.repeat(n, 1), torch.zeros(n, 64, dtype=dtype)):
        attention = torch.rand(n, generator=torch.Generator().manual_seed(n))
        k = max(1, n // 3)
        assert order(method, tokens, k, attention) == list(range(k))


def test_scope_and_cover_differ_in_space_and_mean_alone() -> None:
    embeds = tokens_of(48, 64, seed=3)
    attention = torch.rand(48, generator=torch.Generator().manual_seed(3))
    apart = embeds.double() - embeds.double().mean(dim=0)
    elsewhere = VisualFeatures(apart.float(), embeds, cls_attention=attention)
    assert order("cover", embeds, 48, attention) == SCOPE().select(elsewhere, 48, None).tolist()


# ---- leverage


def leverage(tokens: Tensor) -> list[int]:
    """All tokens, by score."""
    v = tokens.double()
    n, width = v.shape
    ridge = RIDGE * float(v.square().sum()) / n
    inverse = torch.linalg.inv(v.T @ v + ridge * torch.eye(width, dtype=torch.float64))
    raw = [float(v[i] @ inverse @ v[i]) for i in range(n)]
    cosines = normalize(v, dim=1) @ normalize(v, dim=1).T
    scores = []
    for i in range(n):
        better = [j for j in range(n) if (raw[j], -j) > (raw[i], -i)]
        scores.append(raw[i] * (1 - max([0.0, *(float(cosines[i, j]) for j in better)])))
    return sorted(range(n), key=lambda i: -scores[i])


@settings(max_examples=25)
@given(**SHAPES, common=st.sampled_from([0.0, 1.0, 10.0]), width=st.sampled_from([5, 20, 120]))
@example(rows=8, columns=8, share=1.0, seed=0, common=1.0, width=64)
def test_leverage_follows_its_rule(rows: int, columns: int, share: float, seed: int, common: float, width: int) -> None:
    """With more tokens than dimensions, fewer, and as many."""
    n = rows * columns
    tokens, k = tokens_of(n, width, seed, common), max(1, round(share * n))
    assert order("leverage", tokens, k) == leverage(tokens)[:k]


@given(kinds=st.lists(st.integers(0, 6), min_size=1, max_size=60), width=st.sampled_from([7, 64]))
def test_ties_of_leverage_go_to_the_smallest_index(kinds: list[int], width: int) -> None:
    """Of ``m`` equal tokens, orthogonal to all others, each has the score ``1 / (m + RIDGE)``."""
    n = len(kinds)
    first = [i for i in range(n) if kinds[i] not in kinds[:i]]
    expected = sorted(first, key=lambda i: kinds.count(kinds[i])) + [i for i in range(n) if i not in first]
    assert order("leverage", torch.eye(width)[kinds], n) == expected


def test_the_first_of_two_equal_tokens_has_the_leverage() -> None:
    for seed in range(40):
        once = tokens_of(12, 64, seed)
        chosen = order("leverage", once.repeat(2, 1), 24)
        assert sorted(chosen[:12]) == list(range(12)), seed
        assert chosen[12:] == list(range(12, 24)), seed


@pytest.mark.parametrize("width", [20, 120])
def test_leverage_is_where_a_direction_is_held_alone(width: int) -> None:
    """A small token in a direction of its own comes before large ones that share one, and one of those is enough."""
    tokens = torch.zeros(41, width)
    tokens[:40, 0] = 1.0
    tokens[:40, 1] = torch.linspace(-0.01, 0.01, 40)
    tokens[40, 2] = 0.5
    assert order("leverage", tokens, 2) == [40, 0]


# ---- pool


def by_size(k: int, sizes: list[int]) -> list[int]:
    quotas = [Fraction(k * size, sum(sizes)) for size in sizes]
    counts = [math.floor(quota) for quota in quotas]
    largest = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    for i in largest[: k - sum(counts)]:
        counts[i] += 1
    return counts


def cells(k: int, rows: int, columns: int) -> dict[int, list[int]]:
    """The tokens of each cell, as positions on a grid, by what `uniform` keeps of it."""
    tokens = torch.zeros(rows * columns, 2)
    picks: list[int] = plan("uniform", VisualFeatures(tokens, tokens, (rows, columns)), k).kept.tolist()
    used = sorted({pick // columns for pick in picks})
    members: dict[int, list[int]] = {pick: [] for pick in picks}
    for row, column in product(range(rows), range(columns)):
        band = used[math.floor((row + Fraction(1, 2)) * len(used) / rows)]
        of_band = [pick for pick in picks if pick // columns == band]
        members[of_band[math.floor((column + Fraction(1, 2)) * len(of_band) / columns)]].append(row * columns + column)
    return members


def pooled(planes: list[tuple[list[int], tuple[int, int]]], embeds: Tensor, k: int) -> dict[int, Tensor]:
    """The token at each position that is kept; ``planes`` are the positions on each tile, and its grid."""
    tokens = {}
    shares = by_size(k, [len(positions) for positions, _ in planes])
    for (positions, grid), share in zip(planes, shares, strict=True):
        for pick, members in (cells(share, *grid) if share else {}).items():
            tokens[positions[pick]] = embeds[[positions[i] for i in members]].double().mean(dim=0)
    return tokens


def same_tokens(result: PruningPlan, expected: dict[int, Tensor]) -> None:
    assert result.kept.tolist() == sorted(expected)
    torch.testing.assert_close(
        result.embeds.double(), torch.stack([expected[i] for i in sorted(expected)]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 12), (12, 1), (3, 5), (7, 2), (9, 9), (24, 24)])
def test_the_cells_of_a_grid(rows: int, columns: int) -> None:
    """Exactly k, each with the pick of `uniform` in it, and of about the same size in both directions."""
    n = rows * columns
    for k in range(1, n + 1) if n < 100 else (1, 2, 3, 64, 100, 192, 287, 575, 576):
        members = cells(k, rows, columns)
        assert len(members) == k
        assert all(pick in cell for pick, cell in members.items())
        assert sorted(i for cell in members.values() for i in cell) == list(range(n))
        embeds = tokens_of(n, 8, seed=k)
        same_tokens(
            plan("pool", VisualFeatures(embeds, embeds, (rows, columns)), k),
            pooled([(list(range(n)), (rows, columns))], embeds, k),
        )


def test_half_a_grid_in_each_direction() -> None:
    """2 x 2 tokens become one, which stands where the last of them stood."""
    embeds = torch.arange(16.0)[:, None].repeat(1, 3)
    result = plan("pool", VisualFeatures(embeds, embeds, (4, 4)), 4)
    assert result.kept.tolist() == [5, 7, 13, 15]
    assert result.embeds[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_a_sequence_without_a_grid() -> None:
    embeds = torch.arange(6.0)[:, None].repeat(1, 2)
    result = plan("pool", VisualFeatures(embeds, embeds), 2)
    assert result.kept.tolist() == [1, 4]
    assert result.embeds[:, 0].tolist() == [1.0, 4.0]


GRIDS = ((4, 5), (3, 7), (1, 2), (6, 6))
IDS = [0] * 20 + [1] * 21 + [2] * 2 + [3] * 36


def tiled(ids: list[int], tiles: Tiles | None = None) -> VisualFeatures:
    embeds = tokens_of(len(ids), 16, seed=2)
    return VisualFeatures(embeds, embeds, tiles=tiles or Tiles(torch.tensor(ids), GRIDS))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 20, 40, 78, 79])
def test_tiles_share_the_budget_by_their_size(k: int) -> None:
    shuffled = [IDS[i] for i in torch.randperm(79, generator=torch.Generator().manual_seed(0)).tolist()]
    for ids in (IDS, shuffled):
        features = tiled(ids)
        planes = [([i for i, tile in enumerate(ids) if tile == t], grid) for t, grid in enumerate(GRIDS)]
        result = plan("pool", features, k)
        same_tokens(result, pooled(planes, features.embeds, k))
        of_tile = [sum(ids[i] == t for i in result.kept.tolist()) for t in range(len(GRIDS))]
        assert of_tile == by_size(k, [20, 21, 2, 36])
    assert (0 in by_size(k, [20, 21, 2, 36])) == (k < 20)


def test_a_map_of_tiles_is_one_tile() -> None:
    """The overview, and three rows of four tokens that lie on two tiles."""
    ids = [0] * 6 + [1, 1, 2, 2] * 3
    tiles = Tiles(torch.tensor(ids), ((2, 3), (3, 2), (3, 2)), (None, (0, 0, 1, 0.5), (0, 0.5, 1, 1)), canvas=(3, 4))
    features = tiled(ids, tiles)
    planes = [(list(range(6)), (2, 3)), (list(range(6, 18)), (3, 4))]
    for k in (1, 2, 5, 9, 17):
        same_tokens(plan("pool", features, k), pooled(planes, features.embeds, k))


def test_all_tokens_are_their_own_cells() -> None:
    for features in (tiled(IDS), VisualFeatures(torch.ones(35, 4), tokens_of(35, 8, seed=0), (5, 7))):
        merged = Pool().select(features, features.num_tokens, None)
        assert merged.order.tolist() == list(range(features.num_tokens))
        assert torch.equal(merged.embeds, features.embeds)


def test_pooled_tokens_are_of_the_embeddings_type() -> None:
    embeds = tokens_of(36, 8, seed=0).to(torch.bfloat16)
    result = plan("pool", VisualFeatures(embeds, embeds, (6, 6)), 9)
    expected = embeds.double().view(3, 2, 3, 2, 8).mean(dim=(1, 3)).view(9, 8)
    assert result.embeds.dtype == torch.bfloat16
    torch.testing.assert_close(result.embeds, expected.float().to(torch.bfloat16), rtol=0, atol=0)

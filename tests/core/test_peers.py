"""The peers and baselines against their rules written down naively in float64, one token at a time."""

import math
import statistics
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vllm_vtprune import PruningPlan, PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.features import Tiles
from vllm_vtprune.selectors.hired import shares, tile_budgets
from vllm_vtprune.selectors.visionzip import contextual_count

Reference = Callable[[VisualFeatures, int, Tensor | None], list[int]]
ReferenceTokens = Callable[[VisualFeatures, int, Tensor | None], dict[int, Tensor]]


def image(rows: int = 6, columns: int = 8, seed: int = 0) -> VisualFeatures:
    generator = torch.Generator().manual_seed(seed)
    n = rows * columns
    return VisualFeatures(
        encoder=torch.randn(n, 24, generator=generator) + 0.5,
        embeds=torch.randn(n, 120, generator=generator),
        grid=(rows, columns),
        cls_attention=torch.randn(n, generator=generator).mul(2).softmax(dim=0),
        keys=torch.randn(n, 16, generator=generator),
    )


def text_of(seed: int) -> Tensor:
    return torch.randn(3, 120, generator=torch.Generator().manual_seed(seed + 10**6))


def plan(method: str, features: VisualFeatures, k: int, text: Tensor | None = None, **fields: object) -> PruningPlan:
    budget = {"type": "tokens", "keep": k}
    return plan_tokens(features, PruningPolicy.parse({"method": method, "budget": budget, **fields}), text)


def attention(features: VisualFeatures) -> list[float]:
    values: list[float] = features.cls_attention.double().tolist()
    return values


def unit(rows: Tensor | None) -> Tensor:
    return normalize(rows.double(), dim=1)


def by_attention(features: VisualFeatures) -> list[int]:
    scores = attention(features)
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def first_largest(candidates: list[int], score: Callable[[int], float]) -> int:
    return max(candidates, key=lambda i: (score(i), -i))


# ---- methods that return positions


def divprune(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    cosines = unit(features.embeds) @ unit(features.embeds).T
    distance = 1 - (cosines + cosines.T) / 2  # to the last bit: two tokens that are nearest to each other are equal
    others = distance.clone().fill_diagonal_(torch.inf)
    chosen = [int(others.amin(dim=1).argmax())]
    while len(chosen) < k:
        nearest = distance[:, chosen].amin(dim=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def cdpruner(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    """Each step adds the token that makes the determinant of the kernel on the chosen ones largest."""
    v = unit(features.embeds)
    r = torch.ones(len(v), dtype=torch.float64)
    if text is not None:
        r = (v @ unit(text).T).mean(dim=1)
        r = (r - r.min() + 1e-6) / (r.max() - r.min() + 1e-6)
    kernel = r[:, None] * (v @ v.T) * r
    chosen: list[int] = []
    while len(chosen) < k:
        inverse = torch.linalg.inv(kernel[chosen][:, chosen])

        def gain(i: int, inverse: Tensor = inverse) -> float:
            row = kernel[i, chosen]
            return round(float(kernel[i, i] - row @ inverse @ row), 12)  # all start equal without a text

        chosen.append(first_largest([i for i in range(len(v)) if i not in chosen], gain))
    return chosen


def scope(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    cosines = unit(features.encoder) @ unit(features.encoder).T
    chosen: list[int] = []
    while len(chosen) < k:
        cover = cosines[chosen].amax(dim=0).clamp(min=0) if chosen else torch.zeros(len(cosines))
        gains = (cosines - cover).clamp(min=0).sum(dim=1) * torch.tensor(attention(features))
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
    return chosen


def dart(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    v = features.embeds.double()
    norms = v.abs().sum(dim=1)
    pivots = sorted(range(len(v)), key=lambda i: -float(norms[i]))[: max(1, min(8, k // 2))]
    chosen = list(pivots)
    for i, pivot in enumerate(pivots):
        share = (k - len(pivots)) // len(pivots) + (i < (k - len(pivots)) % len(pivots))
        left = [j for j in range(len(v)) if j not in chosen]
        chosen += sorted(left, key=lambda j: float(unit(v)[j] @ unit(v)[pivot]))[:share]
    return chosen


def fastervlm(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    return by_attention(features)[:k]


def vispruner(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    f = unit(features.encoder)
    important, rest = by_attention(features)[: k // 2], by_attention(features)[k // 2 :]
    while len(rest) > k - len(important):
        even, odd = rest[::2], rest[1::2]
        match = (f[even] @ f[odd].T).amax(dim=1).tolist()
        ranking = sorted(range(len(even)), key=lambda i: -match[i])
        duplicates = {even[i] for i in ranking[: min(8, len(rest) - (k - len(important)))]}
        rest = [i for i in rest if i not in duplicates]
    return important + rest


def skip(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    return by_attention(features)[::2][:k]


def cells_3x3(features: VisualFeatures) -> list[list[int]]:
    rows, columns = features.grid
    cells: dict[tuple[int, int], list[int]] = {}
    for row, column in product(range(rows), range(columns)):
        cells.setdefault((row // 3, column // 3), []).append(row * columns + column)
    return list(cells.values())


def maxpool3x3(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    scores = attention(features)
    best = [first_largest(cell, lambda i: scores[i]) for cell in cells_3x3(features)]
    return sorted(best, key=lambda i: -scores[i])[:k]


def avgpool(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    rows, columns = features.grid
    scores = attention(features)
    around = {
        (y, x): [
            scores[i * columns + j]
            for i, j in product((y - 1, y, y + 1), (x - 1, x, x + 1))
            if 0 <= i < rows and 0 <= j < columns
        ]
        for y, x in product(range(rows), range(columns))
    }
    pooled = [statistics.fmean(around[divmod(i, columns)]) for i in range(rows * columns)]
    return sorted(range(len(pooled)), key=lambda i: (-round(pooled[i], 14), i))[:k]


def last(features: VisualFeatures, k: int, text: Tensor | None) -> list[int]:
    return list(reversed(range(features.num_tokens)))[:k]


ORDERS: dict[str, Reference] = {
    f.__name__: f for f in (divprune, cdpruner, scope, dart, fastervlm, vispruner, skip, maxpool3x3, avgpool, last)
}


@pytest.mark.parametrize("method", ORDERS)
@settings(max_examples=12)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), share=st.floats(0, 1), seed=st.integers(0, 9999))
@example(rows=1, columns=5, share=0.0, seed=1)  # two are nearest to each other, and a matrix product is not symmetric
def test_same_order_as_the_rule(method: str, rows: int, columns: int, share: float, seed: int) -> None:
    features, text = image(rows, columns, seed), text_of(seed)
    k = max(1, round(share * rows * columns))
    result = plan(method, features, k, text)
    assert result.order.tolist() == ORDERS[method](features, k, text)[: result.budget]


@pytest.mark.parametrize("method", sorted(set(ORDERS) - {"cdpruner"}))
@settings(max_examples=12)
@given(kinds=st.lists(st.integers(0, 6), min_size=1, max_size=60), share=st.floats(0, 1), level=st.booleans())
def test_ties_go_to_the_smallest_index(method: str, kinds: list[int], share: float, level: bool) -> None:
    """Tokens that are equal or orthogonal, whose cosines are exact, under few levels of attention."""
    tokens = torch.eye(7)[kinds]
    attention = torch.full((len(kinds),), 0.5) if level else torch.tensor(kinds) / 8 + 0.125
    features = VisualFeatures(tokens, tokens, (1, len(kinds)), cls_attention=attention)
    k = max(1, round(share * len(kinds)))
    result = plan(method, features, k)
    assert result.order.tolist() == ORDERS[method](features, k, None)[: result.budget]


@pytest.mark.parametrize("method", ["divprune", "scope", "vispruner", "fastervlm", "dart", "maxpool3x3"])
def test_same_order_at_the_size_of_llava(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(1, 256, generator=generator) + torch.randn(576, 5, generator=generator) @ torch.randn(
        5, 256, generator=generator
    )
    tokens = common + torch.randn(576, 256, generator=generator)
    features = VisualFeatures(tokens, tokens, (24, 24), cls_attention=torch.rand(576, generator=generator))
    assert plan(method, features, 64).order.tolist() == ORDERS[method](features, 64, None)[:64]


def test_without_a_text_cdpruner_is_diversity_alone() -> None:
    features = image()
    assert plan("cdpruner", features, 20).order.tolist() == cdpruner(features, 20, None)


def test_random3x3_draws_one_token_of_each_cell() -> None:
    features = image(7, 8)
    scores = attention(features)
    drawn = plan("random3x3", features, 100, seed=3)
    cells = cells_3x3(features)
    assert drawn.budget == len(cells) == 9
    assert all(len(set(cell) & set(drawn.kept.tolist())) == 1 for cell in cells)
    assert drawn.order.tolist() == sorted(drawn.order.tolist(), key=lambda i: -scores[i])
    assert plan("random3x3", features, 4, seed=3).order.tolist() == drawn.order[:4].tolist()
    assert len({tuple(plan("random3x3", features, 9, seed=seed).kept.tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize(("method", "most"), [("random3x3", 64), ("maxpool3x3", 64), ("skip", 288)])
def test_what_baselines_can_keep_of_576(method: str, most: int) -> None:
    assert plan(method, image(24, 24), 576).budget == most


def test_pooling_does_not_cross_tiles() -> None:
    apart = [image(4, 5, seed=1), image(3, 7, seed=2)]
    grids = ((4, 5), (3, 7))
    joined = VisualFeatures(
        *(torch.cat([getattr(f, name) for f in apart]) for name in ("encoder", "embeds")),
        tiles=Tiles(torch.tensor([0] * 20 + [1] * 21), grids),
        cls_attention=torch.tensor(attention(apart[0]) + attention(apart[1])),
    )
    for method in ("maxpool3x3", "avgpool"):
        counts = [plan(method, f, 100).budget for f in apart]
        first, second = (plan(method, f, count).order.tolist() for f, count in zip(apart, counts, strict=True))
        both = plan(method, joined, 100).order.tolist()
        assert [i for i in both if i < 20] == first
        assert [i - 20 for i in both if i >= 20] == second


# ---- methods that merge


def visionzip(features: VisualFeatures, k: int, text: Tensor | None) -> dict[int, Tensor]:
    contextual = contextual_count(k)
    v, keys = features.embeds.double(), unit(features.keys)
    dominant = by_attention(features)[: k - contextual]
    rest = sorted(set(range(len(v))) - set(dominant))
    targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            assigned[max(targets, key=lambda t: float(keys[i] @ keys[t]))].append(i)
    merged = {t: v[t] + (v[group].mean(dim=0) if group else 0) for t, group in assigned.items()}
    return {**{i: v[i] for i in dominant}, **merged}


def prumerge(features: VisualFeatures, k: int, text: Tensor | None) -> dict[int, Tensor]:
    v, keys, a = features.embeds.double(), unit(features.keys), attention(features)
    kept, others = by_attention(features)[: k - 1], by_attention(features)[k - 1 :]
    tokens = {}
    for i in kept:
        nearest = sorted(others, key=lambda j: -float(keys[i] @ keys[j]))[:32]
        tokens[i] = v[i] + sum(a[j] * v[j] for j in nearest)
    tokens[others[0]] = torch.stack([a[j] * v[j] for j in others]).sum(dim=0)
    return tokens


def trim(features: VisualFeatures, k: int, text: Tensor | None) -> dict[int, Tensor]:
    v = features.embeds.double()
    toward = (v if text is None else text.double()).mean(dim=0)
    ranking = sorted(range(len(v)), key=lambda i: -float(unit(v)[i] @ toward))
    return {**{i: v[i] for i in ranking[: k - 1]}, ranking[k - 1]: v[ranking[k - 1 :]].mean(dim=0)}


def tome(features: VisualFeatures, k: int, text: Tensor | None) -> dict[int, Tensor]:
    v, keys = features.embeds.double(), unit(features.keys)
    clusters = {i: [i] for i in range(len(v))}  # position -> the tokens that have gone there
    r = math.ceil((len(v) - k) / 24)
    while len(clusters) > k:
        places = sorted(clusters)
        means = {i: normalize(keys[clusters[i]].mean(dim=0), dim=0) for i in places}
        a, b = places[::2], places[1::2]
        partner = {i: max(b, key=lambda j: float(means[i] @ means[j])) for i in a}
        pairs = sorted(a, key=lambda i: -float(means[i] @ means[partner[i]]))
        for i in pairs[: min(r, len(places) - k)]:
            clusters[partner[i]] += clusters.pop(i)
    return {i: v[members].mean(dim=0) for i, members in clusters.items()}


MERGES: dict[str, ReferenceTokens] = {f.__name__: f for f in (visionzip, prumerge, trim, tome)}


@pytest.mark.parametrize("method", MERGES)
@settings(max_examples=12)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    share=st.floats(0, 1),
    seed=st.integers(0, 9999),
    text=st.booleans(),
)
def test_same_tokens_as_the_rule(method: str, rows: int, columns: int, share: float, seed: int, text: bool) -> None:
    features = image(rows, columns, seed)
    k = max(1, round(share * rows * columns))
    nouns = text_of(seed) if text else None
    result = plan(method, features, k, nouns)
    if k == features.num_tokens:
        assert torch.equal(result.embeds, features.embeds)
        return
    expected = MERGES[method](features, k, nouns)
    assert result.kept.tolist() == sorted(expected)
    tokens = torch.stack([expected[i] for i in sorted(expected)])
    torch.testing.assert_close(result.embeds.double(), tokens, rtol=1e-5, atol=1e-5)


def test_visionzip_has_the_papers_budgets() -> None:
    assert [(k - contextual_count(k), contextual_count(k)) for k in (64, 128, 192)] == [(54, 10), (108, 20), (162, 30)]
    assert contextual_count(576) == 30
    assert contextual_count(1) == 0
    order = plan("visionzip", image(24, 24), 64).order.tolist()
    assert order[:54] == by_attention(image(24, 24))[:54]
    assert order[54:] == sorted(order[54:])


@pytest.mark.parametrize("method", ["prumerge", "trim"])
def test_outliers_are_the_count_of_methods_that_have_their_own(method: str) -> None:
    features = image(16, 16)
    text, scores = features.embeds[:5], attention(features)
    if method == "trim":
        scores = (unit(features.embeds) @ normalize(text.double().mean(dim=0), dim=0)).tolist()
    first, third = np.quantile(scores, [0.25, 0.75])
    outliers = sum(bool(score > third + 1.5 * (third - first)) for score in scores)
    own = PruningPolicy.parse({"method": method, "budget": {"type": "method"}})
    result = plan_tokens(features, own, text)
    assert result.budget == outliers + 1 > 1
    assert result.energy is None
    assert torch.equal(result.embeds, plan(method, features, outliers + 1, text).embeds)
    flat = VisualFeatures(torch.ones(9, 2), torch.ones(9, 120), cls_attention=torch.ones(9) / 9, keys=torch.ones(9, 4))
    assert plan_tokens(flat, own, text).budget == 1


# ---- ties that are exact in mathematics, and so must not be left to rounding


def test_means_of_the_same_relevances_are_equal() -> None:
    embeds = torch.tensor([[-1.0, 1.0]]).repeat(49, 1)
    embeds[24] = torch.tensor([0.7, 1.0])
    features = VisualFeatures(embeds, embeds, (7, 7))
    order = plan("avgpool", features, 9, torch.tensor([[1.0, 0.0]]), importance="relevance").order.tolist()
    assert order == [16, 17, 18, 23, 24, 25, 30, 31, 32]


def test_two_tokens_differ_from_their_mean_by_the_same() -> None:
    for seed in range(50):
        embeds = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
        order = plan("skip", VisualFeatures(embeds, embeds, (1, 2)), 1, importance="residual").order.tolist()
        assert order == [0], seed


def test_the_first_where_every_token_is_there_twice() -> None:
    for seed in range(40):
        once = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
        twice = once.repeat(2, 1)
        order = plan("divprune", VisualFeatures(twice, twice), 12).order.tolist()
        assert order[0] == 0
        assert order[6:] == sorted(order[6:]), seed


def test_equal_tokens_are_no_outliers() -> None:
    embeds = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(50, 1)
    own = PruningPolicy.parse({"method": "trim", "budget": {"type": "method"}})
    text = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert plan_tokens(VisualFeatures(embeds, embeds), own, text).budget == 1


def test_equal_fractions_go_to_the_first() -> None:
    assert shares(4, [1, 4, 7], [9, 9, 9]) == [1, 1, 2]


@pytest.mark.parametrize("method", ["dart", "divprune", "scope", "cdpruner", "resprune"])
def test_numbers_that_float32_cannot_hold_are_refused(method: str) -> None:
    embeds = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e200
    with pytest.raises(ValueError, match="must be finite"):
        plan(method, VisualFeatures(embeds, embeds, (2, 3), cls_attention=torch.ones(6)), 3)


# ---- HiRED's budgets


def test_tiles_of_another_size_than_they_say_are_an_error() -> None:
    tiles = Tiles(torch.tensor([0] * 10 + [1] * 2), ((1, 2), (2, 5)))
    embeds = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="tile 0 has 10 tokens, but its grid"):
        plan("hired", VisualFeatures(embeds, embeds, tiles=tiles, cls_attention=torch.ones(12)), 6)


OVERVIEW_AND_FOUR = Tiles(
    torch.arange(5).repeat_interleave(16),
    ((4, 4),) * 5,
    (None, (0.0, 0.0, 0.5, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5), (0.5, 0.5, 1.0, 1.0)),
)


def test_hired_gives_tiles_what_the_overview_attends_to() -> None:
    seen = torch.zeros(4, 4)
    seen[0, :2] = 1.0  # two of the four cells with the most attention lie in the first tile
    seen[3, 0] = 0.9
    seen[3, 3] = 0.8
    assert tile_budgets(OVERVIEW_AND_FOUR, seen.flatten(), 8) == [4, 2, 0, 1, 1]
    assert tile_budgets(OVERVIEW_AND_FOUR, seen.flatten(), 1) == [1, 0, 0, 0, 0]
    assert tile_budgets(OVERVIEW_AND_FOUR, seen.flatten(), 80) == [16] * 5
    assert tile_budgets(OVERVIEW_AND_FOUR, None, 40) == [8] * 5


def test_hired_keeps_the_most_attended_of_each_tile() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, scores = torch.randn(80, 8, generator=generator), torch.rand(80, generator=generator)
    overview = torch.rand(16, generator=generator)
    features = VisualFeatures(
        tokens, tokens, tiles=OVERVIEW_AND_FOUR, cls_attention=scores, overview_attention=overview
    )
    for k in (1, 2, 7, 20, 64, 79, 80):
        kept = plan("hired", features, k).kept.tolist()
        for tile, count in enumerate(tile_budgets(OVERVIEW_AND_FOUR, overview, k)):
            members = range(16 * tile, 16 * tile + 16)
            expected = sorted(sorted(members, key=lambda i: -float(scores[i]))[:count])
            assert [i for i in kept if i in members] == expected


@given(tiles=st.lists(st.tuples(st.floats(0, 9), st.integers(0, 30)), min_size=1, max_size=9), share=st.floats(0, 1))
def test_shares_are_exact_and_proportional_where_there_is_room(tiles: list[tuple[float, int]], share: float) -> None:
    weights, rooms = [weight for weight, _ in tiles], [room for _, room in tiles]
    total = round(share * sum(rooms))
    counts = shares(total, weights, rooms)
    assert sum(counts) == total
    assert all(0 <= count <= room for count, room in zip(counts, rooms, strict=True))
    if sum(weights) > 0:
        quotas = [total * weight / sum(weights) for weight in weights]
        if all(quota < room for quota, room in zip(quotas, rooms, strict=True)):
            assert all(abs(count - quota) < 1 + 1e-6 for count, quota in zip(counts, quotas, strict=True))

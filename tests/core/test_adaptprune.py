"""AdaptPrune against the loop of its Algorithm 1, written down in float64."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.features import Tiles
from vllm_vtprune.selectors.adaptprune import centre_mask

PUBLISHED = {"sigma_d": 1.5, "sigma_s": 0.05, "radius": 5.0}


def image(
    grid: tuple[int, int] = (24, 24), d: int = 64, seed: int = 0, tiles: tuple[tuple[int, int], ...] = ()
) -> VisualFeatures:
    """Tokens that are alike near each other, as an image's are; with ``tiles``, those instead of the grid."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(math.prod(g) for g in tiles) or math.prod(grid)
    embeds = torch.randn(1, d, generator=generator) * 3 + torch.randn(n, d, generator=generator).cumsum(0) / 4
    ids = torch.cat([torch.full((math.prod(g),), i) for i, g in enumerate(tiles)]) if tiles else None
    return VisualFeatures(
        encoder=embeds,
        embeds=embeds,
        grid=None if tiles else grid,
        tiles=None if ids is None else Tiles(ids, tiles),
        cls_attention=torch.rand(n, generator=generator).softmax(dim=0),
    )


def policy(k: int, **fields: object) -> PruningPolicy:
    return PruningPolicy.parse({"method": "adaptprune", "budget": {"type": "tokens", "keep": k}, **fields})


def reference_order(
    features: VisualFeatures,
    k: int,
    scores: list[float],
    *,
    sigma_d: float = 1.5,
    sigma_s: float = 0.05,
    radius: float = 5.0,
    correction: bool = True,
    distance: bool = True,
    similarity: bool = True,
) -> list[int]:
    """Algorithm 1, one token at a time."""
    unit = normalize(features.embeds.double(), dim=1)
    places = []  # tile, row, column, centre weight
    for tile, (rows, columns) in enumerate(features.grids):
        for row, column in product(range(rows), range(columns)):
            y, x = ((i - (size - 1) / 2) / (size / 2) for i, size in ((row, rows), (column, columns)))
            places.append((tile, row, column, math.exp(-(y * y + x * x) / 2)))
    if correction:
        for tile in range(len(features.grids)):
            largest = max(weight for t, _, _, weight in places if t == tile)
            scores = [s * p[3] / largest if p[0] == tile else s for s, p in zip(scores, places, strict=True)]
    scores = list(scores)
    chosen: list[int] = []
    while len(chosen) < k:
        i = max((j for j in range(len(scores)) if j not in chosen), key=lambda j: (scores[j], -j))
        chosen.append(i)
        if not (distance or similarity):
            continue
        for j in range(len(scores)):
            squared = (places[i][1] - places[j][1]) ** 2 + (places[i][2] - places[j][2]) ** 2
            if j in chosen or places[i][0] != places[j][0] or (distance and squared > radius**2):
                continue
            spatial = math.exp(-squared / (2 * sigma_d**2)) if distance else 1.0
            alike = math.exp(-((1 - float(unit[i] @ unit[j])) ** 2) / (2 * sigma_s**2)) if similarity else 1.0
            scores[j] *= 1 - spatial * alike
    return chosen


def cls_scores(features: VisualFeatures) -> list[float]:
    scores: list[float] = features.cls_attention.double().tolist()
    return scores


@pytest.mark.parametrize("cues", product((True, False), repeat=3), ids=str)
def test_same_order_as_algorithm_1_with_any_cue_removed(cues: tuple[bool, bool, bool]) -> None:
    features = image((12, 15))
    fields = dict(zip(("correction", "distance", "similarity"), cues, strict=True))
    expected = reference_order(features, 40, cls_scores(features), **fields)
    assert plan_tokens(features, policy(40, **fields)).order.tolist() == expected


def test_same_order_at_the_papers_size() -> None:
    features = image((24, 24), d=1024)
    assert plan_tokens(features, policy(57)).order.tolist() == reference_order(features, 57, cls_scores(features))


@settings(max_examples=25)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    sigma_d=st.floats(0.3, 8),
    sigma_s=st.floats(0.02, 2),
    radius=st.floats(0.5, 9),
)
def test_same_order_for_any_shape_and_constants(
    rows: int, columns: int, share: float, seed: int, sigma_d: float, sigma_s: float, radius: float
) -> None:
    features = image((rows, columns), d=16, seed=seed)
    k = max(1, round(share * rows * columns))
    constants = {"sigma_d": sigma_d, "sigma_s": sigma_s, "radius": radius}
    expected = reference_order(features, k, cls_scores(features), **constants)
    assert plan_tokens(features, policy(k, **constants)).order.tolist() == expected


@pytest.mark.parametrize("fields", [{}, {"distance": False}, {"correction": False}], ids=str)
def test_suppression_stays_within_its_tile(fields: dict[str, bool]) -> None:
    features = image(tiles=((4, 6), (1, 5), (7, 3)))
    expected = reference_order(features, 30, cls_scores(features), **fields)
    assert plan_tokens(features, policy(30, **fields)).order.tolist() == expected
    alone = image((4, 6))
    twice = VisualFeatures(
        alone.encoder.repeat(2, 1),
        alone.embeds.repeat(2, 1),
        tiles=Tiles(torch.arange(2).repeat_interleave(24), ((4, 6), (4, 6))),
        cls_attention=alone.cls_attention.repeat(2),
    )
    order = plan_tokens(alone, policy(7, **fields)).order.tolist()
    both = plan_tokens(twice, policy(14, **fields)).order.tolist()
    assert both == [i for pick in order for i in (pick, pick + 24)]


def test_interleaved_tiles_are_found_by_their_ids() -> None:
    apart = image(tiles=((3, 4), (2, 6)))
    weave = torch.arange(24).view(2, 12).T.flatten()
    woven = VisualFeatures(
        apart.encoder[weave],
        apart.embeds[weave],
        tiles=Tiles(apart.tiles.ids[weave], apart.tiles.grids),
        cls_attention=apart.cls_attention[weave],
    )
    assert weave[plan_tokens(woven, policy(9)).order].tolist() == plan_tokens(apart, policy(9)).order.tolist()


def test_squares_of_one_canvas_are_neighbours_and_the_overview_is_none() -> None:
    apart = image(tiles=((3, 3), (4, 6)))  # the overview, and a map of two squares side by side
    squares = torch.tensor([1, 1, 1, 1, 2, 2]).repeat(4)
    boxes = (None, (0.0, 0.0, 1.0, 4 / 6), (0.0, 4 / 6, 1.0, 1.0))
    ids = torch.cat([torch.zeros(9, dtype=torch.long), squares])
    joined = replace(apart, tiles=Tiles(ids, ((3, 3), (4, 4), (4, 2)), boxes, canvas=(4, 6)))
    assert joined.grids == ((3, 3), (4, 6))
    assert torch.equal(plan_tokens(joined, policy(20)).order, plan_tokens(apart, policy(20)).order)
    separate = replace(apart, tiles=Tiles(ids, ((3, 3), (4, 4), (4, 2)), boxes))
    assert not torch.equal(plan_tokens(separate, policy(20)).order, plan_tokens(apart, policy(20)).order)


def test_centre_mask_is_the_papers() -> None:
    mask = centre_mask(24, 24)
    assert mask.max() == 1
    assert torch.equal(mask, mask.flip(0, 1))
    assert mask[0, 0].item() == pytest.approx(
        math.exp(-(11.5**2) / 12**2) / math.exp(-(0.5**2) / 12**2)
    )  # 12 cells: sigma
    assert centre_mask(1, 1).tolist() == [[1.0]]
    assert centre_mask(1, 3)[0].tolist() == pytest.approx([math.exp(-2 / 9), 1, math.exp(-2 / 9)])


def test_the_published_constants_are_the_defaults() -> None:
    features = image()
    assert torch.equal(plan_tokens(features, policy(57)).order, plan_tokens(features, policy(57, **PUBLISHED)).order)
    for name, value in {"sigma_d": 4.0, "sigma_s": 0.5, "radius": 1.0}.items():
        assert not torch.equal(
            plan_tokens(features, policy(57)).order, plan_tokens(features, policy(57, **{name: value})).order
        )


@pytest.mark.parametrize("value", [1e-200, 1e200])
@pytest.mark.parametrize("name", PUBLISHED)
def test_any_positive_constant_has_its_limit(name: str, value: float) -> None:
    """Too small for anything to be near or alike, or so large that everything is: none overflows."""
    twice = VisualFeatures(*(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1),) * 2, (3, 4))
    order = plan_tokens(twice, policy(12, importance="norm", **{name: value})).order.tolist()
    assert sorted(order) == list(range(12))


def test_importance() -> None:
    features = image((6, 8))
    text = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    embeds = features.embeds.double()
    cosines = normalize(embeds, dim=1) @ normalize(text.double(), dim=1).T
    mean = normalize(embeds.mean(dim=0), dim=0)

    def scaled(relevance: Tensor) -> Tensor:
        below = relevance.max() - relevance
        return 1 - 0.9 * below / max(0.05, float(below.max()))

    maps = {
        "cls": features.cls_attention.double(),
        "auto": features.cls_attention.double(),
        "norm": embeds.norm(dim=1),
        "relevance": scaled(cosines.amax(dim=1)),
        "residual": (embeds - torch.outer(embeds @ mean, mean)).square().sum(dim=1),
    }
    for name, scores in maps.items():
        order = plan_tokens(features, policy(20, importance=name), text).order.tolist()
        assert order == reference_order(features, 20, scores.tolist()), name
    averaged = policy(20, importance="relevance", relevance="mean")
    expected = reference_order(features, 20, scaled(cosines.mean(dim=1)).tolist())
    assert plan_tokens(features, averaged, text).order.tolist() == expected


def test_without_a_text_or_cls_attention() -> None:
    features = image((6, 8))
    by_cls = plan_tokens(features, policy(20)).order
    assert torch.equal(plan_tokens(features, policy(20, importance="relevance")).order, by_cls)
    bare = VisualFeatures(features.encoder, features.embeds, features.grid)
    by_norm = plan_tokens(features, policy(20, importance="norm")).order
    assert torch.equal(plan_tokens(bare, policy(20)).order, by_norm)
    assert torch.equal(plan_tokens(bare, policy(20, importance="relevance")).order, by_norm)
    with pytest.raises(ValueError, match=r'pruning.importance: "cls" needs cls_attention'):
        plan_tokens(bare, policy(20, importance="cls"))


def test_a_map_of_zeros_and_duplicates_keep_k_tokens() -> None:
    features = image((6, 8))
    for embeds, scores in (
        (features.embeds, torch.zeros(48)),
        (features.embeds[:1].expand(48, -1), torch.ones(48)),
        (torch.zeros(48, 64), torch.ones(48)),
    ):
        for fields in ({}, {"distance": False}, {"similarity": False}):
            same = VisualFeatures(embeds, embeds, (6, 8), cls_attention=scores)
            assert plan_tokens(same, policy(48, **fields)).kept.tolist() == list(range(48))


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (Tiles(torch.tensor([0, 0, 0, 1]), ((2, 1), (2, 1))), r"tile 0 has 3 tokens, but its grid \(2, 1\) has 2"),
        (Tiles(torch.tensor([0, 0, 7, 7]), ((2, 1),)), r"tiles.ids must be from 0 to 0"),
        (Tiles(torch.zeros(4), ((2, 1), (2, 1)), canvas=(2, 1)), "tiles.canvas needs an overview"),
        (
            Tiles(torch.zeros(4), ((2, 1), (2, 1)), (None, (0, 0, 1, 1)), canvas=(2, 2)),
            r"tiles.canvas \(2, 2\) and the overview do not hold 4 tokens",
        ),
    ],
)
def test_tiles_that_contradict_themselves(tiles: Tiles, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_tokens(VisualFeatures(torch.eye(4), torch.eye(4), tiles=tiles), policy(2))

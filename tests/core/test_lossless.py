"""Solid borders, and exact duplicates among tokens."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.support.defaults import QWEN
from vllm_vtprune.features import Layout, VisualFeatures
from vllm_vtprune.lossless import Edges, crop_edges, distinct_tokens
from vllm_vtprune.plan import plan_tokens
from vllm_vtprune.policy import LLAVA, PolicyError, PruningPolicy

UNIT = 28


def page(
    height: int, width: int, *, top: int, left: int, rows: int, columns: int, paper: int = 255
) -> NDArray[np.uint8]:
    """A page of one colour with noise on a part of it."""
    pixels = np.full((height, width, 3), paper, np.uint8)
    noise = np.random.default_rng(0).integers(0, 250, (rows, columns, 3), dtype=np.uint8)
    pixels[top : top + rows, left : left + columns] = noise
    return pixels


def test_a_crop_holds_all_that_is_printed_in_whole_units() -> None:
    pixels = page(400, 500, top=100, left=37, rows=50, columns=163)
    left, top, right, bottom = crop_edges(pixels, UNIT)
    assert (left, top) == (37, 100)
    assert (right - left, bottom - top) == (6 * UNIT, 2 * UNIT)
    assert (pixels[top:bottom, left:right] != 255).any(axis=2).sum() == (pixels != 255).any(axis=2).sum()


def test_a_crop_at_the_edge_extends_the_other_way() -> None:
    pixels = page(100, 100, top=90, left=95, rows=10, columns=5)
    assert crop_edges(pixels, UNIT) == (100 - UNIT, 100 - UNIT, 100, 100)


def test_a_cropped_picture_is_not_cropped_again() -> None:
    pixels = page(400, 500, top=100, left=37, rows=50, columns=163)
    left, top, right, bottom = crop_edges(pixels, UNIT)
    assert crop_edges(pixels[top:bottom, left:right], UNIT) == (0, 0, 6 * UNIT, 2 * UNIT)


def test_borders_of_two_colours_go() -> None:
    pixels = np.concatenate([np.zeros((60, 200, 3), np.uint8), page(140, 200, top=0, left=0, rows=60, columns=200)])
    assert crop_edges(pixels, UNIT) == (0, 60, 200, 60 + 3 * UNIT)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize(("size", "edges"), [((300, 200), (0, 0, UNIT, UNIT)), ((10, 20), (0, 0, 10, 20))])
def test_of_one_colour_one_unit_is_left(mode: str, size: tuple[int, int], edges: Edges) -> None:
    assert crop_edges(np.asarray(Image.new(mode, size)), UNIT) == edges


def test_noise_to_the_edges_is_left_alone() -> None:
    assert crop_edges(page(50, 70, top=0, left=0, rows=50, columns=70), UNIT) == (0, 0, 70, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equal_tokens_is_kept(dtype: torch.dtype) -> None:
    tokens = torch.arange(6 * 4 * 3, dtype=torch.float32).view(6, 4, 3)
    order = [0, 1, 0, 2, 1, 3, 3, 3]
    patches = tokens[order].reshape(-1, 3).to(dtype)
    assert distinct_tokens(patches, 2) == (0, 1, 3, 5)
    patches[-1, -1] += 1
    assert distinct_tokens(patches, 2) == (0, 1, 3, 5, 7)


def features(distinct: tuple[int, ...] | None) -> VisualFeatures:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(12, 8, generator=generator)
    return VisualFeatures(embeds, embeds, grid=(3, 4), distinct=distinct)


def plan_of(policy: object, distinct: tuple[int, ...] | None) -> list[int]:
    return plan_tokens(features(distinct), PruningPolicy.parse(policy), family=QWEN).kept.tolist()


def test_the_budget_applies_to_what_is_left() -> None:
    distinct = (0, 2, 3, 5, 8, 11)
    everything = {"dedup": True, "budget": {"type": "ratio", "keep": 1}}
    assert plan_of(everything, distinct) == list(distinct)
    half = plan_of(everything | {"budget": {"type": "ratio", "keep": 0.5}}, distinct)
    assert len(half) == 3
    assert set(half) < set(distinct)
    part = features(None)
    part = VisualFeatures(part.encoder[list(distinct)], part.embeds[list(distinct)])
    alone = plan_tokens(part, PruningPolicy.parse({"budget": {"type": "tokens", "keep": 3}}), family=QWEN).kept
    assert [distinct[index] for index in alone] == half
    assert len(plan_of({"budget": {"type": "ratio", "keep": 0.5}}, distinct)) == 6, "a policy without dedup"
    assert len(plan_of(everything, None)) == 12, "features of a model without it"


def test_the_layout_counts_what_is_left() -> None:
    layout = Layout(48, grid=(3, 4), distinct=(0, 2, 3), border_tokens=5)
    assert layout.without_duplicates().num_tokens == 3
    assert Layout.load(layout.dump()).dump() == layout.dump()


@pytest.mark.parametrize("method", ["adaptprune", "maxpool3x3", "pool"])
def test_methods_that_need_neighbours_are_refused(method: str) -> None:
    policy = PruningPolicy.parse({"method": method, "dedup": True, "budget": {"type": "tokens", "keep": 3}})
    with pytest.raises(PolicyError, match=f"dedup: true given, but method {method} needs .*, which dedup leaves"):
        policy.resolve(QWEN)
    assert policy.resolve(LLAVA).chosen.dedup, "where nothing is dropped"


@pytest.mark.parametrize("name", ["crop_borders", "dedup"])
def test_resize_takes_neither(name: str) -> None:
    with pytest.raises(PolicyError, match=f"{name}: true given, but method resize"):
        PruningPolicy.parse({"method": "resize", "budget": {"type": "tokens", "keep": 9}, name: True})


def test_only_what_is_on_is_shown_and_digested() -> None:
    plain, off = PruningPolicy(), PruningPolicy.parse({"crop_borders": False, "dedup": False})
    on = PruningPolicy.parse({"crop_borders": True, "dedup": True})
    assert plain.dump() == off.dump()
    assert {"crop_borders", "dedup"}.isdisjoint(plain.dump())
    assert on.dump()["dedup"] is True
    assert len({plain.selection_digest(), on.selection_digest()}) == 2

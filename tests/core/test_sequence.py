"""What a language model reads of an image: newlines after all rows, and deepstack beside its token."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.features import Tiles
from vllm_vtprune.sequence import sequence, sequence_length

OVERVIEW, NEWLINE = 4, torch.full((3,), -1.0)


def image(rows: int, columns: int) -> VisualFeatures:
    """An overview of 2 x 2 tokens and a canvas; the tokens are numbered."""
    count = rows * columns
    tiles = Tiles(
        ids=torch.tensor([0] * OVERVIEW + [1] * count),
        grids=((2, 2), (rows, columns)) if count else ((2, 2),),
        boxes=(None, (0, 0, 1, 1)) if count else (None,),
        canvas=(rows, columns),
    )
    embeds = torch.arange(OVERVIEW + count)[:, None].repeat(1, 3).float()
    return VisualFeatures(embeds, embeds, tiles=tiles, newline=NEWLINE)


def keeping(features: VisualFeatures, kept: list[int]) -> Any:
    return SimpleNamespace(kept=torch.tensor(kept), embeds=features.embeds[kept])


def numbers(rows: torch.Tensor) -> list[int]:
    return rows[:, 0].long().tolist()


@given(canvas=st.tuples(st.integers(0, 5), st.integers(0, 5)), data=st.data())
def test_a_row_keeps_its_newline_whichever_tokens_are_kept(canvas: tuple[int, int], data: st.DataObject) -> None:
    """So the length depends on their number alone."""
    features = image(*canvas)
    rows, columns = canvas
    some = sorted(data.draw(st.sets(st.integers(0, features.num_tokens - 1), min_size=1)))
    for kept in (some, list(range(features.num_tokens))):
        expected = [token for token in kept if token < OVERVIEW]
        for row in range(rows):
            start = OVERVIEW + row * columns
            expected += [*(token for token in kept if start <= token < start + columns), -1]
        assert numbers(sequence(features, keeping(features, kept))) == expected
        assert len(expected) == len(kept) + rows
    assert sequence_length(features) == len(expected)


def test_without_newlines_the_tokens_alone() -> None:
    embeds = torch.randn(9, 3)
    features = VisualFeatures(embeds, embeds, grid=(3, 3))
    assert torch.equal(sequence(features, keeping(features, [2, 5])), embeds[[2, 5]])
    assert sequence_length(features) == 9


@pytest.mark.parametrize("method", ["resprune", "trim"])
def test_deepstack_goes_where_its_token_goes(method: str) -> None:
    """And of tokens that were merged, that of the token in whose place they stand."""
    generator = torch.Generator().manual_seed(0)
    embeds, deepstack = (torch.randn(36, width, generator=generator) for width in (8, 6))
    features = VisualFeatures(embeds, embeds, grid=(6, 6), deepstack=deepstack)
    plan = plan_tokens(features, PruningPolicy.parse({"method": method, "budget": {"type": "tokens", "keep": 5}}))
    rows = sequence(features, plan)
    assert len(rows) == 5
    assert torch.equal(rows, torch.cat([plan.embeds, deepstack[plan.kept]], dim=1))


def test_newlines_are_as_wide_as_tokens_with_deepstack() -> None:
    narrow = image(2, 2)
    deepstack = 10.0 + torch.arange(8)[:, None].repeat(1, 2)
    features = replace(narrow, deepstack=deepstack, newline=torch.full((5,), -1.0))
    rows = sequence(features, keeping(features, [0, 5, 6]))
    assert rows.tolist() == [[0] * 3 + [10] * 2, [5] * 3 + [15] * 2, [-1] * 5, [6] * 3 + [16] * 2, [-1] * 5]

"""Positions of kept tokens: runs in the order of the language model, and in each tile."""

from itertools import pairwise

import pytest
import torch

from vllm_vtprune import VisualFeatures
from vllm_vtprune.features import Tiles
from vllm_vtprune.kept import KeptTokens, runs_of

WHOLE = (0.0, 0.0, 1.0, 1.0)


def features(n: int, **place: object) -> VisualFeatures:
    return VisualFeatures(torch.ones(n, 2), torch.ones(n, 2), **place)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("indices", "runs"),
    [
        ([], []),
        ([7], [[7, 1]]),
        ([0, 1, 2], [[0, 3]]),
        ([0, 2, 3, 9], [[0, 1], [2, 2], [9, 1]]),
    ],
)
def test_runs(indices: list[int], runs: list[list[int]]) -> None:
    assert [list(run) for run in runs_of(torch.tensor(indices, dtype=torch.long))] == runs


def test_runs_of_any_selection_hold_its_indices() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.01, 0.3, 0.9):
        indices = (torch.rand(500, generator=generator) < share).nonzero()[:, 0]
        runs = runs_of(indices)
        assert [index for start, length in runs for index in range(start, start + length)] == indices.tolist()
        assert all(start + length < after for (start, length), (after, _) in pairwise(runs))


def test_one_grid() -> None:
    kept = KeptTokens.of(features(6, grid=(2, 3)), torch.tensor([0, 1, 5]), (0.0, 1 / 6, 1.0, 5 / 6))
    assert kept.to_json() == {
        "grid": [2, 3],
        "runs": [[0, 2], [5, 1]],
        "tiles": None,
        "view": [0.0, 0.166667, 1.0, 0.833333],
    }


def test_tiles_say_where_their_tokens_lie() -> None:
    """The tokens of the tiles are interleaved here; runs of a tile are cells of its grid."""
    left, right = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
    tiles = Tiles(torch.tensor([2, 2, 0, 1, 0, 1]), ((1, 2), (2, 1), (1, 2)), (left, right, None))
    kept = KeptTokens.of(features(6, tiles=tiles), torch.tensor([1, 2, 3, 5]), WHOLE).to_json()
    assert (kept["grid"], kept["runs"]) == (None, [[1, 3], [5, 1]])
    assert kept["tiles"] == [
        {"grid": [1, 2], "box": list(left), "runs": [[0, 1]]},
        {"grid": [2, 1], "box": list(right), "runs": [[0, 2]]},
        {"grid": [1, 2], "box": None, "runs": [[1, 1]]},
    ]


def test_a_canvas_counts_as_one_tile() -> None:
    halves = ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0))
    tiles = Tiles(torch.tensor([0, 1, 2, 1, 2]), ((1, 1), (2, 1), (2, 1)), (None, *halves), (2, 2))
    kept = KeptTokens.of(features(5, tiles=tiles), torch.tensor([0, 4]), WHOLE).to_json()
    assert kept["tiles"] == [
        {"grid": [1, 1], "box": None, "runs": [[0, 1]]},
        {"grid": [2, 2], "box": list(WHOLE), "runs": [[3, 1]]},
    ]


def test_unknown_positions() -> None:
    kept = KeptTokens.of(features(4, prompt=(-1, 9, -1, -1, -1)), torch.tensor([2, 3]), None).to_json()
    assert kept == {"grid": None, "runs": [[2, 2]], "tiles": None, "view": None}

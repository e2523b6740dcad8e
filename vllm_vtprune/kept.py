"""Which visual tokens of an image were kept, and where they lie in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import TypeAdapter

from vllm_vtprune.features import Box, VisualFeatures
from vllm_vtprune.lazy import Tensor, torch

Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Start and length of every run of consecutive indices, ascending."""


@dataclass(frozen=True)
class KeptTile:
    """The kept tokens of one of several grids of an image.

    Attributes:
        grid: rows and columns.
        box: the part of `KeptTokens.view` that the grid covers; None for the overview, which covers all of it.
        runs: kept cells, in raster order of the grid.
    """

    grid: tuple[int, int]
    box: Box | None
    runs: Runs


@dataclass(frozen=True)
class KeptTokens:
    """The kept tokens of an image.

    Attributes:
        grid: rows and columns, if the tokens form one grid in raster order; else None.
        runs: kept tokens, in the order in which the language model reads them, newlines not counted.
        tiles: the grids of an image that has several.
        view: the part of the image that reaches the encoder; None if the image's size is unknown.
    """

    grid: tuple[int, int] | None
    runs: Runs
    tiles: tuple[KeptTile, ...]
    view: Box | None

    @classmethod
    def of(cls, features: VisualFeatures, kept: Tensor, view: Box | None = None) -> KeptTokens:
        """Of one image.

        Args:
            features: the image's N visual tokens.
            kept: (k,) int64 indices of the kept tokens, ascending.
            view: see the attribute.
        """
        kept = kept.cpu()
        tiles = []
        if features.tiles is not None:
            is_kept = torch.zeros(features.num_tokens, dtype=torch.bool)
            is_kept[kept] = True
            for (positions, grid), box in zip(features.planes(), features.boxes, strict=True):
                tiles.append(KeptTile(grid, box, runs_of(is_kept[positions.cpu()].nonzero()[:, 0])))
        return cls(features.grid, runs_of(kept), tuple(tiles), view)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> KeptTokens:
        """Of a report's JSON; the inverse of `to_json`."""
        return _ADAPTER.validate_python({**values, "tiles": values["tiles"] or ()})

    def to_json(self) -> dict[str, Any]:
        """As clients see it."""
        tiles = [{"grid": list(tile.grid), "box": _rounded(tile.box), "runs": _lists(tile.runs)} for tile in self.tiles]
        return {
            "grid": None if self.grid is None else list(self.grid),
            "runs": _lists(self.runs),
            "tiles": tiles or None,
            "view": _rounded(self.view),
        }


def runs_of(indices: Tensor) -> Runs:
    """The runs of ``(k,)`` ascending indices."""
    if not len(indices):
        return ()
    ends = torch.cat([(indices.diff() != 1).nonzero()[:, 0], torch.tensor([len(indices) - 1])])
    starts = torch.cat([torch.tensor([0]), ends[:-1] + 1])
    return tuple(zip(indices[starts].tolist(), (ends - starts + 1).tolist(), strict=True))


def indices_of(runs: Runs) -> Tensor:
    """(k,) int64 indices in runs; the inverse of `runs_of`."""
    return torch.cat([torch.arange(start, start + length) for start, length in runs])


def _lists(runs: Iterable[tuple[int, int]]) -> list[list[int]]:
    return [list(run) for run in runs]


def _rounded(box: Box | None) -> list[float] | None:
    return None if box is None else [round(side, 6) for side in box]


_ADAPTER = TypeAdapter(KeptTokens)

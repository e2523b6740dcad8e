"""Partition a grid of tokens into ``k`` roughly square cells: bands of rows, each cut into columns.

Bands, and the columns of a band, are equal up to rounding. A token belongs to the cell that contains its centre.
"""

from math import ceil, sqrt

from vllm_vtprune.lazy import Tensor, torch


def cell_middles(k: int, rows: int, columns: int) -> list[int]:
    """Index of the middle token of each cell, ascending; ``k`` is from 1 to ``rows * columns``."""
    counts = _cells_of_bands(k, rows, columns)
    return [
        row * columns + column
        for row, count in zip(_middles(len(counts), rows), counts, strict=True)
        for column in _middles(count, columns)
    ]


def cell_of_tokens(k: int, rows: int, columns: int) -> Tensor:
    """``(rows * columns,)`` int64 cell of each token, numbered as in :func:`cell_middles`."""
    counts = torch.tensor(_cells_of_bands(k, rows, columns))
    band = _part(torch.arange(rows), len(counts), rows)
    column = _part(torch.arange(columns), counts[band][:, None], columns)
    return ((counts.cumsum(0) - counts)[band][:, None] + column).flatten()


def _cells_of_bands(k: int, rows: int, columns: int) -> list[int]:
    bands = min(max(round(sqrt(k * rows / columns)), ceil(k / columns), 1), rows, k)
    return [(i + 1) * k // bands - i * k // bands for i in range(bands)]


def _middles(count: int, length: int) -> list[int]:
    """The middles of ``count`` equal parts of ``range(length)``."""
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _part(index: Tensor, count: int | Tensor, length: int) -> Tensor:
    """Which of ``count`` equal parts of ``range(length)`` contains the centre of each ``index``."""
    return (2 * index + 1) * count // (2 * length)

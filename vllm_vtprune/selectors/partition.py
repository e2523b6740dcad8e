"""A grid of tokens cut into ``k`` cells, about as high as they are wide: bands of rows, each cut into columns.

Bands are as equal as whole rows allow, and so are the columns of a band. A token belongs to the band and the column in
which its centre lies.
"""

from math import ceil, sqrt

from vllm_vtprune.lazy import Tensor, torch


def cell_middles(k: int, rows: int, columns: int) -> list[int]:
    """For each of the ``k`` cells, ``1..rows * columns``, the position of the token in its middle; ascending."""
    counts = _cells_of_bands(k, rows, columns)
    return [
        row * columns + column
        for row, count in zip(_middles(len(counts), rows), counts, strict=True)
        for column in _middles(count, columns)
    ]


def cell_of_tokens(k: int, rows: int, columns: int) -> Tensor:
    """``(rows * columns,)`` int64: the cell of each token, as :func:`cell_middles` numbers them."""
    counts = torch.tensor(_cells_of_bands(k, rows, columns))
    band = _stretch(torch.arange(rows), len(counts), rows)
    column = _stretch(torch.arange(columns), counts[band][:, None], columns)
    return ((counts.cumsum(0) - counts)[band][:, None] + column).flatten()


def _cells_of_bands(k: int, rows: int, columns: int) -> list[int]:
    bands = min(max(round(sqrt(k * rows / columns)), ceil(k / columns), 1), rows, k)
    return [(i + 1) * k // bands - i * k // bands for i in range(bands)]


def _middles(count: int, length: int) -> list[int]:
    """The middles of ``count`` equal stretches of ``length`` places."""
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _stretch(place: Tensor, count: int | Tensor, length: int) -> Tensor:
    """In which of ``count`` equal stretches of ``length`` places the centre of each ``place`` lies."""
    return (2 * place + 1) * count // (2 * length)

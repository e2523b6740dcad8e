"""What can go before any token is selected: solid borders of an image, and exact duplicates among its tokens."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Edges: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image, in pixels; right and bottom are exclusive."""


def crop_edges(pixels: NDArray[np.generic], unit: int) -> Edges:
    """The part of an image within its solid borders: rows and columns at its edges in which every pixel has one colour.

    What is left is a multiple of ``unit`` pixels in either direction where the image is large enough, so that resizing
    to such multiples does not change its scale. Of an image of one colour, one unit is left.

    Args:
        pixels: ``(H, W)`` or ``(H, W, C)``.
        unit: side of a visual token, in pixels.
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    top, bottom = _inside(pixels)
    if top == bottom:
        return 0, 0, min(unit, pixels.shape[1]), min(unit, pixels.shape[0])
    left, right = _inside(pixels[top:bottom].swapaxes(0, 1))
    (left, right), (top, bottom) = (
        _whole_units(begin, end, length, unit)
        for begin, end, length in ((left, right, pixels.shape[1]), (top, bottom, pixels.shape[0]))
    )
    return left, top, right, bottom


def _inside(lines: NDArray[np.generic]) -> tuple[int, int]:
    """The first line with another colour than the first pixel's, and the end of the last line like that."""
    count = len(lines)
    begin = next((i for i in range(count) if not (lines[i] == lines[0, 0]).all()), count)
    end = next((i for i in range(count, begin, -1) if not (lines[i - 1] == lines[-1, -1]).all()), begin)
    return begin, end


def _whole_units(begin: int, end: int, length: int, unit: int) -> tuple[int, int]:
    """Extend a range to a multiple of ``unit``, at least one, within ``length``: at its end, then at its beginning."""
    wanted = min(max(-(-(end - begin) // unit), 1) * unit, length)
    end = min(begin + wanted, length)
    return end - wanted, end


def distinct_tokens(patches: Tensor, merge: int) -> tuple[int, ...]:
    """Indices of the visual tokens whose pixels differ from those of every token before them, ascending.

    Args:
        patches: ``(N * merge**2, P)`` the pixels of each patch; the patches of a token are adjacent.
        merge: patches per token in either direction.
    """
    rows = patches.contiguous().view(len(patches) // merge**2, -1).cpu()
    first: dict[bytes, int] = {}
    for index, row in enumerate(rows.view(torch.uint8).numpy()):  # bytes: numpy has no bfloat16
        first.setdefault(row.tobytes(), index)
    return tuple(first.values())

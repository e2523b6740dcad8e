"""Uniform: tokens evenly spaced over the grid. A method that does not beat it is not worth serving."""

from math import ceil, sqrt

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in raster order: evenly spaced rows, and in each of them evenly spaced columns.

    The rows are about as far apart as the columns. Without a grid, tokens are evenly spaced along the sequence.
    """
    rows, columns = features.grid or (1, features.num_tokens)
    used_rows = min(max(round(sqrt(k * rows / columns)), ceil(k / columns), 1), rows, k)
    picks: list[int] = []
    for i, row in enumerate(_spread(used_rows, rows)):
        in_row = (i + 1) * k // used_rows - i * k // used_rows
        picks += [row * columns + column for column in _spread(in_row, columns)]
    return torch.tensor(picks, device=features.embeds.device)


def _spread(count: int, cells: int) -> list[int]:
    """The middles of ``count`` equal stretches of ``cells`` cells."""
    return [(2 * i + 1) * cells // (2 * count) for i in range(count)]

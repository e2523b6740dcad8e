"""Lengths of tokens, and rows of length 1, whose products are cosines."""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
CHUNK = 64  # rows turned to float64 at once on a CPU, so that they stay in its cache


def squared_lengths(rows: Tensor) -> Tensor:
    """``(N,)`` squared lengths of ``rows (N, d)``, in float64."""
    chunks = [rows] if rows.is_cuda else torch.split(rows, CHUNK)
    return torch.cat([chunk.double().square().sum(dim=1) for chunk in chunks])


def unit_rows(rows: Tensor) -> Tensor:
    """``rows (N, d)`` scaled to length 1 in float32; rows of zeros stay zero, so their cosines are 0.

    On a GPU in float64, which is cheap there, because float32 products may be set to TF32, which is too coarse.
    """
    rows = rows.double() if rows.is_cuda else rows.float()
    norms = squared_lengths(rows).sqrt()[:, None]
    return rows / norms.clamp(min=TINY).to(rows.dtype)

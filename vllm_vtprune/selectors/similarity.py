"""Rows of length 1, whose products are cosines."""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def unit_rows(rows: Tensor) -> Tensor:
    """``rows (N, d)`` scaled to length 1 in float32; rows of zeros stay zero, so their cosines are 0.

    On a GPU in float64, which is cheap there, because float32 products may be set to TF32, which is too coarse.
    """
    rows = rows.double() if rows.is_cuda else rows.float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    return rows / norms.clamp(min=TINY).to(rows.dtype)

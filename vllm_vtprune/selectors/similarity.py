"""Lengths of tokens, and rows of length 1, whose products are cosines."""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
CHUNK = 64  # rows turned to float64 at once on a CPU, so that they stay in its cache
GPU_CHUNK = 1024  # the same on a GPU: launches are few, and no copy is large


def squared_lengths(rows: Tensor) -> Tensor:
    """``(N,)`` squared lengths of ``rows (N, d)``, in float64."""
    chunks = torch.split(rows, CHUNK if rows.device.type == "cpu" else GPU_CHUNK)
    return torch.cat([chunk.double().square().sum(dim=1) for chunk in chunks])


def unit_rows(rows: Tensor) -> Tensor:
    """``rows (N, d)`` scaled to length 1 in float32; rows of zeros stay zero, so their cosines are 0."""
    rows = rows.float()
    norms = squared_lengths(rows).sqrt()[:, None]
    return rows / norms.clamp(min=TINY).to(rows.dtype)

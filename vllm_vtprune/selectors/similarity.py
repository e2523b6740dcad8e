"""The rows that tokens are compared by, their lengths, and rows of length 1, whose products are cosines."""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy

TINY = torch.finfo(torch.float32).tiny
CHUNK = 64  # rows turned to float64 at once on a CPU, so that they stay in its cache
GPU_CHUNK = 1024  # the same on a GPU: launches are few, and no copy is large


def compared_rows(features: VisualFeatures, policy: PruningPolicy) -> Tensor:
    """The rows, in float32, that the policy's ``features`` names: ``embeds (N, d)``, ``encoder (N, d_v)``, or both.

    Both are ``(N, d + d_v)``: side by side, each scaled to a mean squared length of 1, so that they count alike.
    """
    if policy.features != "both":
        return (features.embeds if policy.features == "projected" else features.encoder).float()
    spaces = (features.embeds, features.encoder)
    widths = [rows.shape[1] for rows in spaces]
    joint = features.embeds.new_empty(features.num_tokens, sum(widths), dtype=torch.float32)
    for columns, rows in zip(
        torch.split(joint, widths, dim=1), spaces, strict=True
    ):  # in place, to take no more memory
        columns.copy_(rows).div_(squared_lengths(rows).mean().sqrt().clamp(min=TINY))
    return joint


def squared_lengths(rows: Tensor) -> Tensor:
    """``(N,)`` squared lengths of ``rows (N, d)``, in float64."""
    chunks = torch.split(rows, CHUNK if rows.device.type == "cpu" else GPU_CHUNK)
    return torch.cat([chunk.double().square().sum(dim=1) for chunk in chunks])


def unit_rows(rows: Tensor) -> Tensor:
    """``rows (N, d)`` scaled to length 1 in float32; rows of zeros stay zero, so their cosines are 0."""
    rows = rows.float()
    norms = squared_lengths(rows).sqrt()[:, None]
    return rows / norms.clamp(min=TINY).to(rows.dtype)

"""The embedding sequence of an image: its kept tokens, and the newlines between them.

Some tiled models add a learnt embedding, the newline, after each row of the canvas. Newlines are not selected and do
not count against the budget. A row keeps its newline if any of its tokens is kept. Rows without tokens (of a very
narrow image) keep theirs, too, so that with all tokens kept the sequence is the model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plan import PruningPlan


def sequence(features: VisualFeatures, plan: PruningPlan) -> Tensor:
    """``(T, d + p)`` embeddings to prefill for an image, on the device of ``plan.embeds``.

    Args:
        features: the image's N visual tokens.
        plan: its plan. A merged token gets the deepstack values of its index in ``plan.kept``.
    """
    embeds = plan.embeds
    if features.deepstack is not None:
        deepstack = features.deepstack[plan.kept.to(features.deepstack.device)]
        embeds = torch.cat([embeds, deepstack.to(embeds)], dim=1)
    if features.newline is None:
        return embeds
    rows, columns = features.canvas
    newline = features.newline.to(embeds)
    if rows and not columns:
        return torch.cat([embeds, newline.expand(rows, -1)])
    overview = features.num_tokens - rows * columns
    row = (plan.kept - overview).div(max(columns, 1), rounding_mode="floor")  # negative: overview
    ends_row = row >= 0
    ends_row[:-1] &= row[1:] != row[:-1]
    newlines_before = ends_row.long().cumsum(0) - ends_row.long()
    out = newline.repeat(len(embeds) + int(ends_row.sum()), 1)
    out[torch.arange(len(embeds), device=newlines_before.device) + newlines_before] = embeds
    return out


def sequence_length(features: VisualFeatures) -> int:
    """``T`` with every token kept."""
    return features.num_tokens + (0 if features.newline is None else features.canvas[0])

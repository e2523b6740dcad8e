"""The embedding sequence of an image: its kept tokens, and the newlines between them.

Some tiled models add a learnt embedding, the newline, after each row of the canvas. Newlines are not selected and do
not count against the budget: every row keeps its newline, also a row of which no token is kept. So the length follows
from the number of kept tokens and the image's size, and the newlines before a token still count the rows above it.
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
    overview = features.num_tokens - rows * columns
    row = (plan.kept - overview).div(max(columns, 1), rounding_mode="floor")  # negative: overview
    out = features.newline.to(embeds).repeat(len(embeds) + rows, 1)
    out[torch.arange(len(row), device=row.device) + row.clamp(min=0)] = embeds
    return out


def sequence_length(features: VisualFeatures) -> int:
    """``T`` with every token kept."""
    return features.num_tokens + (0 if features.newline is None else features.canvas[0])

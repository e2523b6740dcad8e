"""What a language model reads of an image: its tokens, with what the model puts between them.

After each row of the canvas of a tiled model may stand a learnt embedding, the newline. Newlines are structure, not
content: they take no part in a selection and do not count against a budget. A row keeps its newline as long as one of
its tokens stays, and one that never had a token (of an image many times as high as wide) keeps it too: with every token
kept, the sequence is the model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plan import PruningPlan


def sequence(features: VisualFeatures, plan: PruningPlan) -> Tensor:
    """``(T, d + p)`` what is prefilled for an image, on the device of ``plan.embeds``.

    Args:
        features: of the whole image.
        plan: which of its tokens are kept. A merged one has the deepstack of the token in whose place it stands.
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
    row = (plan.kept - overview).div(max(columns, 1), rounding_mode="floor")  # below 0: of the overview
    ends = row >= 0
    ends[:-1] &= row[1:] != row[:-1]
    before = ends.long().cumsum(0) - ends.long()  # newlines before each token
    out = newline.repeat(len(embeds) + int(ends.sum()), 1)
    out[torch.arange(len(embeds), device=before.device) + before] = embeds
    return out


def sequence_length(features: VisualFeatures) -> int:
    """``T`` of the whole image, with every token kept."""
    return features.num_tokens + (0 if features.newline is None else features.canvas[0])

"""SCOPE: the token that covers most of what is not yet covered, weighted by the CLS token's attention.

"SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs". A token's gain, the sum over all tokens
of what it adds to their cosine with the nearest chosen one, can only fall as tokens are chosen. So an old gain is an
upper bound, and a step looks again only at the tokens with the largest bounds: the picks are those of the full search.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.similarity import unit_rows

BLOCK = 16  # gains computed at once


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in order of selection, by cosine of ``encoder (N, d_v)`` and ``cls_attention (N,)``."""
    assert features.cls_attention is not None
    unit = unit_rows(features.encoder)
    cosines = (unit @ unit.T).clamp_(min=0)
    saliency = features.cls_attention.double()
    covered = torch.zeros_like(cosines[0])
    bounds = cosines.sum(dim=1, dtype=torch.float64) * saliency
    known = torch.ones_like(bounds, dtype=torch.bool)  # the bound is the gain
    order: list[int] = []
    while len(order) < k:
        best = bounds.argmax()
        if not (known[best] or bounds[best] <= 0):
            block = torch.cat([best[None], bounds.topk(min(BLOCK, len(bounds))).indices])
            gains = (cosines[block] - covered).clamp_(min=0).sum(dim=1, dtype=torch.float64)
            bounds[block] = torch.where(bounds[block] > -torch.inf, gains * saliency[block], -torch.inf)
            known[block] = True
            continue
        order.append(int(best))
        bounds[best] = -torch.inf
        torch.maximum(covered, cosines[best], out=covered)
        known.zero_()
    return torch.tensor(order, device=unit.device)

"""DART: a few pivots, and the tokens least like them.

"Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More". The paper takes four visual
and four text tokens of a layer of the language model as pivots; before prefill, all eight are visual tokens.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.similarity import unit_rows

PIVOTS = 8


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)``: the pivots, at most half of them, then for each pivot in turn the same number of tokens.

    Pivots are the tokens of ``embeds (N, d)`` with the largest L1 norm; each brings the remaining tokens with the
    smallest cosine.
    """
    norms = torch.linalg.vector_norm(features.embeds.float(), ord=1, dim=1, dtype=torch.float64)
    pivots = norms.sort(descending=True, stable=True).indices[: max(1, min(PIVOTS, k // 2))]
    unit = unit_rows(features.embeds)
    cosines = unit[pivots] @ unit.T
    cosines[:, pivots] = torch.inf
    order = [pivots]
    each, extra = divmod(k - len(pivots), len(pivots))
    for i, row in enumerate(cosines):
        brought = row.sort(stable=True).indices[: each + (i < extra)]
        cosines[:, brought] = torch.inf
        order.append(brought)
    return torch.cat(order)

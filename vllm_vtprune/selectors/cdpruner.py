"""CDPruner: the most diverse tokens, given the question.

"Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs": a determinantal point
process with the kernel ``r_i cos(v_i, v_j) r_j``, whose most probable set is found greedily. The greedy step takes the
largest residual diagonal of an incremental Cholesky factorisation: ResPrune's recurrence, on tokens of length ``r_i``.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.pivots import weighted_pivots
from vllm_vtprune.selectors.resprune import text_relevance
from vllm_vtprune.selectors.similarity import unit_rows

LEAST = 1e-6  # relevance of the least relevant token; the most relevant has 1


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in order of selection.

    Args:
        features: ``embeds (N, d)``.
        k: tokens to keep, ``1..N``.
        policy: not read.
        text_embeds: ``(M, d)``; a token's relevance is its mean cosine with them. Without them all are as relevant.
    """
    tokens = unit_rows(features.embeds)
    relevance = tokens.new_ones(len(tokens))
    if text_embeds is not None:
        relevance = text_relevance(tokens, text_embeds.to(tokens.dtype), "mean")
        relevance = relevance - relevance.min() + LEAST
        relevance /= relevance.max()
    energy = torch.where(tokens.any(dim=1), relevance.double().square(), 0.0)
    return weighted_pivots(tokens * relevance[:, None], energy, torch.ones_like(energy), int(energy.argmax()), k)

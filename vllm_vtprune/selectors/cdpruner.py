"""CDPruner: diverse tokens, conditioned on the question.

Greedy MAP inference of a determinantal point process with the kernel ``r_i cos(v_i, v_j) r_j``. Each step takes the
largest residual diagonal of an incremental Cholesky factorisation: ResPrune's recurrence on tokens of length ``r_i``.
"""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.pivots import weighted_pivots
from vllm_vtprune.selectors.similarity import ReadsText, text_relevance, unit_rows

LEAST = 1e-6  # relevance of the least relevant token, before scaling the largest to 1


class CDPruner(ReadsText):
    method: Literal["cdpruner"] = "cdpruner"
    idea = "greedy diversity (determinantal point process), conditioned on the question"
    paper = "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
    arxiv = "2506.10967"
    equivariant = True
    runs_on = "device"

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` in order of selection.

        Relevance is a token's mean cosine with the rows of ``text_embeds (M, d)``; equal for all tokens without a text.
        """
        tokens = unit_rows(features.embeds)
        relevance = tokens.new_ones(len(tokens))
        if text_embeds is not None:
            relevance = text_relevance(tokens, text_embeds.to(tokens.dtype), "mean")
            relevance = relevance - relevance.min() + LEAST
            relevance /= relevance.max()
        energy = torch.where(tokens.any(dim=1), relevance.double().square(), 0.0)
        return weighted_pivots(tokens * relevance[:, None], energy, torch.ones_like(energy), int(energy.argmax()), k)

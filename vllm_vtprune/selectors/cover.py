"""CoverPruner: greedy coverage of what sets the tokens apart.

As SCOPE, but in the language model's input space, and on what is left of the tokens without their mean: what all of
them share says nothing about which to keep. The paper weights by what the first layer of the language model attends to;
before prefill, the parameter ``importance`` stands in. No code is public: the rule follows a summary of the paper.
"""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.coverage import greedy_coverage
from vllm_vtprune.selectors.importance import ReadsImportance


class CoverPruner(ReadsImportance):
    method: Literal["cover"] = "cover"
    idea = "greedy coverage of the mean-centred tokens, weighted by importance"
    paper = "CoverPruner (arXiv 2609.03158)"
    arxiv = "2609.03158"
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Positions ``(k,)`` in order of selection, by cosine of ``embeds (N, d)`` minus their mean and by importance.

        A token equal to the mean covers nothing. Where all tokens are equal, the first ``k`` are kept.
        """
        tokens = features.embeds.float()
        mean = tokens.sum(dim=0, dtype=torch.float64) / len(tokens)  # exact where all tokens are equal
        return greedy_coverage(tokens - mean, self.importance_map(features, text_embeds), k)

"""CoverPruner: greedy coverage of mean-centred tokens.

Like SCOPE, but in the language model's input space, and with the tokens' mean subtracted. The paper weights by
attention of the language model's first layer; here, before prefill, by the parameter ``importance``. No code is public:
the rule follows a summary of the paper.
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
        """Indices ``(k,)`` in order of selection, by importance and cosines of ``embeds (N, d)`` minus their mean.

        A token equal to the mean covers nothing. If all tokens are equal, the first ``k`` are kept.
        """
        tokens = features.embeds.float()
        mean = tokens.sum(dim=0, dtype=torch.float64) / len(tokens)  # exact if all tokens are equal
        return greedy_coverage(tokens - mean, self.importance_map(features, text_embeds), k)

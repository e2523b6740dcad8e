"""CoverPruner: the token that covers most of what sets the tokens apart, weighted by importance.

"CoverPruner (arXiv 2609.03158)". As SCOPE, but in the language model's input space, and on what is left of the tokens
without their mean: what all of them share says nothing about which to keep. The paper weights by what the first layer
of the language model attends to; before prefill, the policy's ``importance`` stands in. No code is public: the rule
follows a summary of the paper.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.coverage import greedy_coverage
from vllm_vtprune.selectors.importance import importance_map


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in order of selection, by cosine of ``embeds (N, d)`` minus their mean and by importance.

    A token equal to the mean covers nothing. Where all tokens are equal, the first ``k`` are kept.
    """
    tokens = features.embeds.float()
    mean = tokens.sum(dim=0, dtype=torch.float64) / len(tokens)  # exact where all tokens are equal
    return greedy_coverage(tokens - mean, importance_map(features, policy, text_embeds), k)

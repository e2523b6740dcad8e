"""VTW: after some layers no visual token is left.

"Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vtprune.budget import token_budget
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune_evaluation.in_llm.pruning import Budget, Entrance, Pruning


@dataclass(frozen=True)
class VTW(Pruning):
    """All visual tokens leave after so many layers that the mean over the layers is as near to k as whole layers allow.

    At least the first layer sees them. `Answer.tokens` has the mean that it came to.

    Attributes:
        budget: k, the mean.
    """

    budget: Budget

    def schedule(self, features: VisualFeatures, layers: int) -> list[int]:
        n = features.num_tokens
        k, _ = token_budget(self.budget, features)
        after = max(1, (2 * k * layers + n) // (2 * n))  # k * layers / n, rounded half up
        return [n] * after + [0] * (layers - after)

    def choose(self, entrance: Entrance, count: int) -> Tensor:
        return torch.arange(count)

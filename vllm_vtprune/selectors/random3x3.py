"""Random 3 x 3: one token of each 3 x 3 cell, by importance. A baseline of AdaptPrune's paper (Table 5 d)."""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.importance import importance_map
from vllm_vtprune.selectors.maxpool3x3 import best_of_cells


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)``, most important first; ``k`` is at most the number of cells. ``policy.seed`` draws."""
    importance = importance_map(features, policy, text_embeds)
    lots = torch.rand(len(importance), generator=torch.Generator().manual_seed(policy.seed), dtype=torch.float64)
    drawn = best_of_cells(features, lots.to(importance.device))
    return drawn[importance[drawn].sort(descending=True, stable=True).indices[:k]]

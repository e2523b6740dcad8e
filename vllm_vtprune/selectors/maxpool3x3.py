"""Max pooling: the best token of each 3 x 3 cell, by importance. A baseline of AdaptPrune's paper (Table 5 e)."""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.importance import importance_map


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)``, most important first; ``k`` is at most the number of cells."""
    importance = importance_map(features, policy, text_embeds)
    best = best_of_cells(features, importance)
    return best[importance[best].sort(descending=True, stable=True).indices[:k]]


def best_of_cells(features: VisualFeatures, scores: Tensor) -> Tensor:
    """Position of the largest of ``scores (N,)`` in each 3 x 3 cell of each tile, ascending; cells may be cut off."""
    best = []
    for positions, grid in features.planes():
        _, cells = max_pool2d(scores[positions].view(1, *grid), 3, ceil_mode=True, return_indices=True)
        best.append(positions[cells.flatten()])
    return torch.cat(best).sort().values

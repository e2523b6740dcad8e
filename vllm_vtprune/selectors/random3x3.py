"""Random 3 x 3: one token of each 3 x 3 cell. A baseline of AdaptPrune's paper (Table 5 d)."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.maxpool3x3 import OneOfEachCell


class Random3x3(OneOfEachCell):
    method: Literal["random3x3"] = "random3x3"
    idea = "one random token per 3 x 3 cell, ranked by importance"
    paper = "baseline (AdaptPrune, Table 5 d)"
    draws = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``, most important first."""
        importance = self.importance_map(features, text_embeds)
        draws = torch.rand(len(importance), generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        drawn = self.best_of_cells(features, draws.to(importance.device))
        return drawn[importance[drawn].sort(descending=True, stable=True).indices[:k]]

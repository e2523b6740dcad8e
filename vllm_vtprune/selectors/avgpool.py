"""Average pooling: a baseline of AdaptPrune's paper (Table 5 f)."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.importance import ReadsImportance


class AvgPool(ReadsImportance):
    method: Literal["avgpool"] = "avgpool"
    idea = "highest mean importance over the 3 x 3 neighbourhood"
    paper = "baseline (AdaptPrune, Table 5 f)"
    arxiv = "2503.08019"
    cost = "ranking"
    needs = frozenset({"positions"})

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` by the mean importance of the 3 x 3 neighbourhood within the tile, highest first."""
        scores = self.importance_map(features, text_embeds)
        for positions, grid in features.planes():
            plane = scores[positions].view(1, *grid)
            means = torch.nn.functional.avg_pool2d(plane, 3, stride=1, padding=1, count_include_pad=False)
            scores[positions] = means.flatten()
        return scores.sort(descending=True, stable=True).indices[:k]

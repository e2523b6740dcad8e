"""Max pooling: the best token of each 3 x 3 cell. A baseline of AdaptPrune's paper (Table 5 e)."""

from typing import Literal

from vllm_vtprune.features import Counted, VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.importance import ReadsImportance


class OneOfEachCell(ReadsImportance):
    """A method that keeps at most one token per 3 x 3 cell of each tile; cells at the border may be smaller."""

    arxiv = "2503.08019"
    cost = "ranking"
    needs = frozenset({"positions"})
    capped = True

    @classmethod
    def max_keep(cls, features: Counted) -> int:
        """The number of cells."""
        return sum(-(-rows // 3) * -(-columns // 3) for rows, columns in features.grids)

    def best_of_cells(self, features: VisualFeatures, scores: Tensor) -> Tensor:
        """Index of the largest of ``scores (N,)`` in each cell, ascending."""
        best = []
        for positions, grid in features.planes():
            plane = scores[positions].view(1, *grid)
            _, cells = torch.nn.functional.max_pool2d(plane, 3, ceil_mode=True, return_indices=True)
            best.append(positions[cells.flatten()])
        return torch.cat(best).sort().values


class MaxPool(OneOfEachCell):
    method: Literal["maxpool3x3"] = "maxpool3x3"
    idea = "the most important token per 3 x 3 cell, ranked by importance"
    paper = "baseline (AdaptPrune, Table 5 e)"

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``, most important first."""
        importance = self.importance_map(features, text_embeds)
        best = self.best_of_cells(features, importance)
        return best[importance[best].sort(descending=True, stable=True).indices[:k]]

"""AdaptPrune: soft non-maximum suppression over importance, distance and similarity.

Eq. 1-3 and Algorithm 1, with the constants of the published code. Two deviations, because the language model has not
run yet: the scores are the parameter ``importance``, and similarity compares input embeddings instead of a layer's
keys, for which ``sigma_s`` was not tuned.
"""

from typing import Literal

from pydantic import Field

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.importance import ReadsImportance
from vllm_vtprune.selectors.method import FamilyDefaults
from vllm_vtprune.selectors.similarity import unit_rows


class AdaptPrune(ReadsImportance):
    method: Literal["adaptprune"] = "adaptprune"
    idea = "greedy by importance, suppressing tokens near and similar to those kept"
    paper = "Multi-Cue Adaptive Visual Token Pruning for Large Vision-Language Models"
    arxiv = "2503.08019"
    needs = frozenset({"positions"})

    sigma_d: float | None = Field(default=None, gt=0, description="Reach of suppression by distance; null: 1.5 tokens.")
    sigma_s: float | None = Field(default=None, gt=0, description="Reach of suppression by similarity; null: 0.05.")
    radius: float | None = Field(default=None, gt=0, description="Largest distance that suppresses; null: 5 tokens.")
    correction: bool = Field(default=True, description="Prefer the centre of the image, or of each tile.")
    distance: bool = Field(default=True, description="Suppress tokens near a kept one.")
    similarity: bool = Field(default=True, description="Suppress tokens similar to a kept one.")

    def defaults(self, family: FamilyDefaults) -> dict[str, object]:
        return super().defaults(family) | {"sigma_d": 1.5, "sigma_s": 0.05, "radius": 5.0}

    def idle(self) -> frozenset[str]:
        distance = set() if self.distance else {"sigma_d", "radius"}
        return super().idle() | distance | (set() if self.similarity else {"sigma_s"})

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` in order of selection.

        Tiles share one budget; tokens suppress only tokens of their own tile. With neither ``distance`` nor
        ``similarity``, the most important tokens are kept.
        """
        scores = self.importance_map(features, text_embeds)
        tile, row, column = (torch.empty_like(scores) for _ in range(3))
        for i, (positions, (rows, columns)) in enumerate(features.planes()):
            cells = torch.arange(rows * columns, device=scores.device)
            tile[positions] = float(i)
            row[positions], column[positions] = (cells // columns).double(), (cells % columns).double()
            if self.correction:
                scores[positions] *= centre_mask(rows, columns).flatten().to(scores.device)
        if not (self.distance or self.similarity):
            return scores.sort(descending=True, stable=True).indices[:k]

        assert self.sigma_d is not None
        assert self.sigma_s is not None
        assert self.radius is not None
        unit = unit_rows(features.embeds)
        remaining = torch.ones_like(scores, dtype=torch.bool)
        order = []
        for _ in range(k):
            pick = int(scores.argmax())
            order.append(pick)
            remaining[pick] = False
            scores[pick] = -torch.inf
            near = remaining & (tile == tile[pick])
            squared = (row - row[pick]).square_().add_((column - column[pick]).square_())
            if self.distance:
                near &= squared <= self.radius * self.radius
            suppressed = near.nonzero()[:, 0]
            decay = torch.ones_like(scores[suppressed])
            if self.distance:
                decay *= torch.exp(-squared[suppressed] / self.sigma_d / self.sigma_d / 2)
            if self.similarity:
                distance = 1 - (unit[suppressed] @ unit[pick]).double()
                decay *= torch.exp(-(distance / self.sigma_s).square() / 2)
            scores[suppressed] *= 1 - decay
        return torch.tensor(order, device=scores.device)


def centre_mask(rows: int, columns: int) -> Tensor:
    """``(rows, columns)`` float64: a Gaussian at the centre, with sigma half the grid's height and width."""
    down, across = (
        torch.exp(-((2 * torch.arange(cells, dtype=torch.float64) - cells + 1) / cells).square() / 2)
        for cells in (rows, columns)
    )
    return torch.outer(down / down.max(), across / across.max())

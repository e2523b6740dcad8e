"""Uniform: tokens evenly spaced over the grid. A baseline that every method should beat."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.partition import cell_middles


class Uniform(Method):
    method: Literal["uniform"] = "uniform"
    idea = "tokens evenly spaced over the grid"
    cost = "ranking"
    uses = frozenset({"grid"})

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` in raster order: evenly spaced rows, and evenly spaced columns in each row.

        Rows are about as far apart as columns. Without a grid, tokens are evenly spaced along the sequence.
        """
        rows, columns = features.grid or (1, features.num_tokens)
        return torch.tensor(cell_middles(k, rows, columns), device=features.embeds.device)

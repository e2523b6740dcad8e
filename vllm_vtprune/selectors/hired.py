"""HiRED: a budget per tile from the overview's attention, then the highest CLS attention in each tile.

An image of one tile keeps the tokens with the highest CLS attention.
"""

from fractions import Fraction
from math import floor, prod
from typing import Literal

from vllm_vtprune.features import Tiles, VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method

OVERVIEW = 0.5  # share of the budget for the overview if there are other tiles


class HiRED(Method):
    method: Literal["hired"] = "hired"
    idea = "per-tile budgets from the overview's attention, then highest CLS attention in each"
    paper = "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models"
    arxiv = "2408.10945"
    cost = "ranking"
    needs = frozenset({"cls_attention"})
    uses = frozenset({"overview_attention"})
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``, highest ``cls_attention (N,)`` first.

        Without ``overview_attention`` or the tiles' ``boxes``, tiles share the budget by size.

        Raises:
            ValueError: a tile's token count does not match its grid.
        """
        assert features.cls_attention is not None
        ranking = features.cls_attention.sort(descending=True, stable=True).indices
        if features.tiles is None:
            return ranking[:k]
        if features.tiles.canvas is None:
            features.planes()  # raises if a tile's token count does not match its grid
        tile_of = features.tiles.ids[ranking]
        is_kept = torch.zeros_like(ranking, dtype=torch.bool)
        for i, count in enumerate(tile_budgets(features.tiles, features.overview_attention, k)):
            is_kept[(tile_of == i).nonzero()[:count, 0]] = True
        return ranking[is_kept]


def tile_budgets(tiles: Tiles, overview_attention: Tensor | None, k: int) -> list[int]:
    """Tokens to keep of each tile, ``k`` in total.

    Half of the budget goes to the overview, and ``m`` tokens to the other tiles: in proportion to how many of the
    overview's ``m`` cells with the highest attention lie in a tile's box.
    """
    sizes = [prod(grid) for grid in tiles.grids]
    overview = tiles.overview
    if overview_attention is None or overview is None or len(sizes) == 1:
        return shares(k, [float(size) for size in sizes], sizes)
    details = max(k - sizes[overview], floor(k * (1 - OVERVIEW)))
    rows, columns = tiles.grids[overview]
    cells = overview_attention.sort(descending=True, stable=True).indices[:details].tolist()
    cells_in = [0.0] * len(sizes)
    for cell in cells:
        y, x = (cell // columns + 0.5) / rows, (cell % columns + 0.5) / columns
        for i, box in enumerate(tiles.boxes):
            if box is not None and box[0] <= y < box[2] and box[1] <= x < box[3]:
                cells_in[i] += 1
    limits = [0 if i == overview else size for i, size in enumerate(sizes)]
    budgets = shares(min(details, sum(limits)), cells_in, limits)
    budgets[overview] = k - sum(budgets)
    return budgets


def shares(total: int, weights: list[float], limits: list[int]) -> list[int]:
    """Divide ``total`` in proportion to ``weights``, each share at most its limit; largest-remainder rounding."""
    assigned = [0] * len(limits)
    open_, remaining = list(range(len(limits))), total
    while open_:
        weight = sum(weights[i] for i in open_)
        by = weights if weight > 0 else [float(limit) for limit in limits]
        total_weight = sum(Fraction(by[i]) for i in open_) or Fraction(1)
        quotas = {i: remaining * Fraction(by[i]) / total_weight for i in open_}
        full = [i for i in open_ if quotas[i] >= limits[i]]
        if not full:
            break
        for i in full:
            assigned[i] = limits[i]
            open_.remove(i)
            remaining -= limits[i]
    for i in open_:
        assigned[i] = floor(quotas[i])
    largest_fractions = sorted(open_, key=lambda i: (assigned[i] - quotas[i], i))
    for i in largest_fractions[: total - sum(assigned)]:
        assigned[i] += 1
    return assigned

"""HiRED: a budget for each tile, by what the overview attends to; in each tile the CLS token's choice.

An image of one tile keeps the tokens with the most CLS attention.
"""

from fractions import Fraction
from math import floor, isqrt, prod
from typing import Literal

from vllm_vtprune.features import Tiles, VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method

OVERVIEW = 0.5  # share of the budget that the overview gets beside other tiles


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
        """Positions ``(k,)``, most ``cls_attention (N,)`` first.

        Without ``overview_attention`` or the tiles' ``boxes``, tiles share the budget by size.
        """
        assert features.cls_attention is not None
        ranking = features.cls_attention.sort(descending=True, stable=True).indices
        if features.tiles is None:
            return ranking[:k]
        if features.tiles.canvas is None:
            features.planes()  # an error where the tiles are not of the sizes that they say
        tile_of = features.tiles.ids[ranking]
        stays = torch.zeros_like(ranking, dtype=torch.bool)
        for i, count in enumerate(tile_budgets(features.tiles, features.overview_attention, k)):
            stays[(tile_of == i).nonzero()[:count, 0]] = True
        return ranking[stays]


def tile_budgets(tiles: Tiles, overview_attention: Tensor | None, k: int) -> list[int]:
    """Tokens to keep of each tile, ``k`` in all.

    Of the budget, half goes to the overview. The rest is shared by how many of the overview's cells with the most
    attention, as many as there is budget to share, lie in each tile's box.
    """
    sizes = [prod(grid) for grid in tiles.grids]
    overviews = [i for i, box in enumerate(tiles.boxes) if box is None]
    if overview_attention is None or len(overviews) != 1 or len(sizes) == 1:
        return shares(k, [float(size) for size in sizes], sizes)
    overview = overviews[0]
    details = max(k - sizes[overview], floor(k * (1 - OVERVIEW)))
    rows, columns = tiles.grids[overview]
    if rows * columns != len(overview_attention):  # the encoder's cells are finer or coarser than the tokens
        rows = columns = isqrt(len(overview_attention))
    cells = overview_attention.sort(descending=True, stable=True).indices[:details].tolist()
    seen = [0.0] * len(sizes)
    for cell in cells:
        y, x = (cell // columns + 0.5) / rows, (cell % columns + 0.5) / columns
        for i, box in enumerate(tiles.boxes):
            if box is not None and box[0] <= y < box[2] and box[1] <= x < box[3]:
                seen[i] += 1
    rooms = [0 if i == overview else size for i, size in enumerate(sizes)]
    budgets = shares(min(details, sum(rooms)), seen, rooms)
    budgets[overview] = k - sum(budgets)
    return budgets


def shares(total: int, weights: list[float], rooms: list[int]) -> list[int]:
    """``total`` in proportion to ``weights``, none above its room; parts of one go to the largest fractions."""
    given = [0] * len(rooms)
    open_, left = list(range(len(rooms))), total
    while open_:
        weight = sum(weights[i] for i in open_)
        by = weights if weight > 0 else [float(room) for room in rooms]
        whole = sum(Fraction(by[i]) for i in open_) or Fraction(1)
        quotas = {i: left * Fraction(by[i]) / whole for i in open_}
        full = [i for i in open_ if quotas[i] >= rooms[i]]
        if not full:
            break
        for i in full:
            given[i] = rooms[i]
            open_.remove(i)
            left -= rooms[i]
    for i in open_:
        given[i] = floor(quotas[i])
    largest_fractions = sorted(open_, key=lambda i: (given[i] - quotas[i], i))
    for i in largest_fractions[: total - sum(given)]:
        given[i] += 1
    return given

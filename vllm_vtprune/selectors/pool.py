"""Pool: the mean of each of ``k`` grid cells, like a smaller image. A baseline that every method should beat."""

from math import prod
from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.hired import shares
from vllm_vtprune.selectors.merged import Merged, group_means
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.partition import cell_middles, cell_of_tokens


class Pool(Method):
    method: Literal["pool"] = "pool"
    idea = "means of equal grid cells"
    cost = "ranking"
    uses = frozenset({"positions"})
    merges = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Merged:
        """``k`` cell means in raster order, tile after tile, each at the position of its cell's middle token.

        Tiles share ``k`` by size (largest-remainder rounding). Tokens of a tile without a share are dropped. Without a
        grid, a cell is a part of the sequence.
        """
        device = features.embeds.device
        planes = features.planes() or [(torch.arange(features.num_tokens, device=device), (1, features.num_tokens))]
        sizes = [prod(grid) for _, grid in planes]
        order, members, cells = [], [], []
        first = 0
        for (positions, grid), share in zip(planes, shares(k, [float(size) for size in sizes], sizes), strict=True):
            if share:
                order.append(positions[cell_middles(share, *grid)])
                members.append(positions)
                cells.append(first + cell_of_tokens(share, *grid).to(device))
                first += share
        means = group_means(features.embeds[torch.cat(members)].float(), torch.cat(cells), k)
        return Merged(torch.cat(order), means.to(features.embeds.dtype))

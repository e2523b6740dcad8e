"""What a method returns that merges tokens instead of dropping them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True, eq=False)
class Merged:
    """``k`` tokens, each standing at the position of one of the image's ``N`` tokens.

    Attributes:
        order: ``(k,)`` int64 distinct positions, in order of selection.
        embeds: ``(k, d)`` the token that goes to each of these positions, in the type of the input embeddings.
    """

    order: Tensor
    embeds: Tensor


def group_means(rows: Tensor, group: Tensor, count: int) -> Tensor:
    """``(count, d)``: the mean of those ``rows (R, d)`` whose ``group (R,)`` it is, zeros where there are none.

    Rows add up in their order, so that the result is the same each time, on a GPU too.
    """
    sizes = torch.bincount(group, minlength=count)
    return embedding_bag(group.argsort(stable=True), rows, offsets=sizes.cumsum(0) - sizes, mode="mean")

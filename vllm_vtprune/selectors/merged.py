"""What a method returns that merges tokens instead of dropping them."""

from dataclasses import dataclass

from vllm_vtprune.lazy import Tensor, torch


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
    members, offsets = group.argsort(stable=True), sizes.cumsum(0) - sizes
    return torch.nn.functional.embedding_bag(members, rows, offsets=offsets, mode="mean")

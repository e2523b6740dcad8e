"""The result of a method that merges tokens."""

from dataclasses import dataclass

from vllm_vtprune.lazy import Tensor, torch


@dataclass(frozen=True, eq=False)
class Merged:
    """``k`` merged tokens, each at the position of one of the image's ``N`` tokens.

    Attributes:
        order: ``(k,)`` int64 distinct indices, in order of selection.
        embeds: ``(k, d)`` the token at each index, in the dtype of the input embeddings.
    """

    order: Tensor
    embeds: Tensor


def group_means(rows: Tensor, group: Tensor, count: int) -> Tensor:
    """``(count, d)`` mean of the ``rows (R, d)`` of each group; zeros for an empty group.

    Deterministic, on GPUs too: rows are summed in order.

    Args:
        rows: ``(R, d)`` rows.
        group: ``(R,)`` int64 group of each row, ``0..count - 1``.
        count: number of groups.
    """
    sizes = torch.bincount(group, minlength=count)
    members, offsets = group.argsort(stable=True), sizes.cumsum(0) - sizes
    return torch.nn.functional.embedding_bag(members, rows, offsets=offsets, mode="mean")

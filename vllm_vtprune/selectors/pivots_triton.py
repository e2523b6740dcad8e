"""The draft of a panel of :mod:`~vllm_vtprune.selectors.pivots` on a GPU, by one Triton kernel.

One program makes all its picks, without a word to the host. Its sizes are the same for all images and counts, so that
Triton compiles it once for a type of GPU: no argument that varies makes another form of it. Nothing in it is larger
than the candidates by the candidates, so that 32-bit indices reach everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_vtprune.selectors.pivots import CANDIDATES, GPU_PANEL

WIDTH = CANDIDATES * GPU_PANEL  # candidates, a power of two
TILE = 8  # directions read at once
WARPS = 4


def draft(gram: Tensor, residual: Tensor, gate: Tensor, spanned: Tensor, seed: Tensor, count: int) -> Tensor:
    """The next picks among ``m`` candidates, at most ``count``, until what is left of them is spanned.

    Args:
        gram: ``(m, m)`` what is left of the candidates' Gram matrix. All in float64, ``m`` at most ``WIDTH``.
        residual: ``(m,)``.
        gate: ``(m,)``.
        spanned: ``(m,)``.
        seed: ``(1,)`` int64, the first pick.
        count: at most ``WIDTH``.

    Returns:
        ``(c,)`` int64 candidates, in order, ``1 <= c <= count``.
    """
    rows = gram.new_empty(count, WIDTH)
    order = seed.new_empty(count + 1)  # and at the end, how many
    with torch.cuda.device(gram.device if gram.is_cuda else -1):  # Triton launches on the current device
        _draft[(1,)](gram, residual, gate, spanned, seed, rows, order, len(gram), count, WIDTH, TILE, num_warps=WARPS)
    return order[: int(order[count])]


POINTERS = ["gram", "residual", "gate", "spanned", "seed", "rows", "order"]


@triton.jit(do_not_specialize=["candidates", "count"], do_not_specialize_on_alignment=POINTERS)
def _draft(  # type: ignore[no-untyped-def]
    gram, residual, gate, spanned, seed, rows, order, candidates, count, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    columns = tl.arange(0, WIDTH)
    valid = columns < candidates
    left = tl.load(residual + columns, mask=valid, other=0.0)
    gates = tl.load(gate + columns, mask=valid, other=0.0)
    floor = tl.load(spanned + columns, mask=valid, other=0.0)
    pick = tl.load(seed).to(tl.int32)
    step = 0
    more = count > 0
    while more:
        tl.store(order + step, pick.to(tl.int64))
        here = columns == pick
        row = tl.load(gram + pick * candidates + columns, mask=valid, other=0.0)
        for first in range(0, step, TILE):
            tile = first + tl.arange(0, TILE)
            known = tl.load(rows + tile * WIDTH + pick, mask=tile < step, other=0.0)
            at = tile[:, None] * WIDTH + columns[None, :]
            row -= tl.sum(known[:, None] * tl.load(rows + at, mask=(tile < step)[:, None], other=0.0), axis=0)
        row = row / tl.sqrt(tl.sum(tl.where(here, left, 0.0), axis=0))
        tl.store(rows + step * WIDTH + columns, row)
        tl.debug_barrier()  # the next step reads this row at other columns
        left = tl.where(here, 0.0, left - row * row)
        scores = tl.where(left > floor, left * gates, 0.0)
        best = tl.max(scores, axis=0)
        pick = tl.min(tl.where(scores == best, columns, WIDTH), axis=0)
        step += 1
        more = (step < count) & (best > 0.0)
    tl.store(order + count, step)

"""Weighted pivots on a GPU, without a word to the host until all picks are made.

The step-by-step recurrence of :mod:`~vllm_vtprune.selectors.pivots` on the whole Gram matrix, all in float64, which a
data-centre GPU computes at full speed (float32 products may be set to TF32, which is too coarse). Up to 1,024 tokens
one launch makes all picks, with the state of every token in registers; above, one launch makes one pick, each program
having a slice of the tokens and reading the last pick off the best of each slice. Both take images side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ONE_PROGRAM = 1024  # tokens of which one program keeps the state
TILE = 8  # directions read at once


def pivots(
    tokens: Tensor,
    energy: Tensor,
    gate: Tensor,
    spanned: Tensor,
    seeds: Tensor,
    k: int,
    slice_tokens: int = ONE_PROGRAM,
) -> Tensor:
    """The pivots ``(B, k)`` of ``B`` images of one shape, in order, as int64 on their device.

    Args:
        tokens: ``(B, N, d)``.
        energy: ``(B, N)`` squared lengths, in float64.
        gate: ``(B, N)`` in float64, above 0 and at most 1.
        spanned: ``(B, N)`` in float64: residual energy that counts as none.
        seeds: ``(B,)`` int64, the first pivot of each.
        k: how many, ``1..N``; the picks of a smaller ``k`` are the first of them.
        slice_tokens: most tokens of one program, a power of two.
    """
    exact = tokens.double()
    gram = exact @ exact.mT
    images, n = energy.shape
    factor = gram.new_zeros(images, k, n)
    order = seeds.new_empty(images, k)
    if n <= slice_tokens:
        _all_picks[(images,)](
            gram, energy, gate, spanned, seeds, factor, order, n, k, triton.next_power_of_2(n), TILE, num_warps=8
        )
        return order
    residual, late = energy.clone(), -1 / gate
    slices = triton.cdiv(n, slice_tokens)
    best = seeds.new_empty(2, images, slices)  # of each slice, after even and after odd steps
    score, left = (gram.new_empty(best.shape) for _ in range(2))
    for step in range(k):
        _next_pick[(images, slices)](
            gram, energy, gate, spanned, seeds, factor, residual, late, best, score, left, order,
            step, n, k, slices, triton.next_power_of_2(slices), slice_tokens, TILE, num_warps=8,
        )  # fmt: skip
    return order


@triton.jit
def _coefficients(gram, factor, pick, left, directions, columns, valid, n, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Coefficients of the tokens at ``columns`` on the direction that ``pick`` adds to those of ``factor``."""
    row = tl.load(gram + pick * n + columns, mask=valid, other=0.0)
    for first in range(0, directions, TILE):
        tile = first + tl.arange(0, TILE)
        known = tl.load(factor + tile * n + pick, mask=tile < directions, other=0.0)
        at = tile[:, None] * n + columns[None, :]
        mask = (tile < directions)[:, None] & valid[None, :]
        row -= tl.sum(known[:, None] * tl.load(factor + at, mask=mask, other=0.0), axis=0)
    return row / tl.sqrt(left)


@triton.jit
def _all_picks(  # type: ignore[no-untyped-def]
    gram, energy, gate, spanned, seeds, factor, order, n, k, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """All picks of one image. A spanned pick leaves zeros in ``factor``, so that row ``j`` belongs to pick ``j``."""
    image = tl.program_id(0).to(tl.int64)
    gram += image * n * n
    factor += image * k * n
    columns = tl.arange(0, WIDTH)
    valid = columns < n
    residual = tl.load(energy + image * n + columns, mask=valid, other=0.0)
    gates = tl.load(gate + image * n + columns, mask=valid, other=0.0)
    floor = tl.load(spanned + image * n + columns, mask=valid, other=0.0)
    late = tl.where(valid, -1.0 / gates, -float("inf"))
    pick = tl.load(seeds + image).to(tl.int32)
    for step in range(0, k):
        tl.store(order + image * k + step, pick)
        here = columns == pick
        left = tl.sum(tl.where(here, residual, 0.0), axis=0)
        if left > tl.sum(tl.where(here, floor, 0.0), axis=0):
            row = _coefficients(gram, factor, pick, left, step, columns, valid, n, TILE)
            tl.store(factor + step * n + columns, row, mask=valid)
            residual -= row * row
        tl.debug_barrier()  # the next step reads this row at other columns
        residual = tl.where(here, 0.0, residual)
        late = tl.where(here, -float("inf"), late)
        scores = tl.where(residual > floor, residual * gates, late)
        best = tl.max(scores, axis=0)
        pick = tl.min(tl.where(scores == best, columns, WIDTH), axis=0)


@triton.jit(do_not_specialize=["step"])
def _next_pick(  # type: ignore[no-untyped-def]
    gram, energy, gate, spanned, seeds, factor, residual, late, best, score, left, order,
    step, n, k, slices, SLICES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pick of one image, and the best of one slice after it.

    Everything read at the pick was written by earlier launches: ``residual`` is not read there, since the program that
    has the pick in its slice changes it; what is left of the pick stands beside the best of its slice.
    """
    image = tl.program_id(0).to(tl.int64)
    images = tl.num_programs(0)
    part = tl.program_id(1)
    gram += image * n * n
    factor += image * k * n
    before = ((step + 1) % 2 * images + image) * slices
    after = (step % 2 * images + image) * slices
    if step == 0:
        pick = tl.load(seeds + image)
        rest = tl.load(energy + image * n + pick)
    else:
        each = tl.arange(0, SLICES)
        scores_before = tl.load(score + before + each, mask=each < slices, other=-float("inf"))
        top = tl.max(scores_before, axis=0)
        winner = tl.min(tl.where(scores_before == top, each, SLICES), axis=0)
        pick = tl.load(best + before + winner)
        rest = tl.load(left + before + winner)
    if part == 0:
        tl.store(order + image * k + step, pick)

    columns = part * WIDTH + tl.arange(0, WIDTH)
    valid = columns < n
    at = image * n + columns
    floor = tl.load(spanned + at, mask=valid, other=0.0)
    gates = tl.load(gate + at, mask=valid, other=0.0)
    energies = tl.load(residual + at, mask=valid, other=0.0)
    lates = tl.load(late + at, mask=valid, other=-float("inf"))
    if rest > tl.load(spanned + image * n + pick):
        row = _coefficients(gram, factor, pick, rest, step, columns, valid, n, TILE)
        tl.store(factor + step * n + columns, row, mask=valid)
        energies -= row * row
    energies = tl.where(columns == pick, 0.0, energies)
    lates = tl.where(columns == pick, -float("inf"), lates)
    tl.store(residual + at, energies, mask=valid)
    tl.store(late + at, lates, mask=valid)
    scores = tl.where(energies > floor, energies * gates, lates)
    top_here = tl.max(scores, axis=0)
    found = tl.min(tl.where(scores == top_here, columns, n), axis=0)
    tl.store(best + after + part, found.to(tl.int64))
    tl.store(score + after + part, top_here)
    tl.store(left + after + part, tl.sum(tl.where(columns == found, energies, 0.0), axis=0))

"""How many tokens to keep: spectral energy (E-AdaPrune, Eq. 4-6 and Algorithms 1 and 2) or a fixed count.

Features may be on a GPU, most of which are slow in float64. So the GPU computes products and orthogonal bases in
float32; the CPU computes sums, eigenvalues of small matrices, and everything in float64. ``Spectrum.rounding`` bounds
the error of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures, require_finite
from vllm_vtprune.policy import EnergyBudget, RatioBudget, TokensBudget
from vllm_vtprune.precision import full_float32

Solver: TypeAlias = Literal["auto", "exact", "rsvd"]

KRYLOV_FROM = 1024  # smaller side of F from which "auto" tries a Krylov subspace first
KRYLOV_BLOCK = 64  # columns by which the subspace grows
KRYLOV_SHARE = 0.375  # largest subspace, as a share of the smaller side; beyond it, all eigenvalues cost less
ROUNDING = 4e-6  # error of a sum of eigenvalues from float32 products, as a share of the total energy
TOLERANCE = 0.01  # relative uncertainty of the rank that "auto" accepts


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Squared singular values of a feature matrix ``F``, which is neither centred nor normalised.

    Attributes:
        energies: ``(r,)`` float64 squared singular values on the CPU, largest first; may be only the leading ones.
        total: ``||F||_F^2``.
        missing: upper bound of the energy that ``energies`` underestimates.
        rounding: upper bound of the rounding error of a sum of ``energies``.
    """

    energies: Tensor
    total: float
    missing: float = 0.0
    rounding: float = 0.0

    def rank_at(self, threshold: float) -> int | None:
        """``k*``: the fewest components with a ``threshold`` share of the energy (Eq. 6), 1 for ``F = 0``; None if
        ``energies`` do not reach it."""
        return self._first_above(threshold * self.total)

    def settles(self, threshold: float) -> bool:
        """Whether the rank at ``threshold`` is certain to 1 %, given ``missing`` and ``rounding``."""
        target = threshold * self.total
        most = self._first_above(target + self.rounding)
        fewest = self._first_above(target - self.rounding - self.missing)
        return most is not None and fewest is not None and fewest >= (1 - TOLERANCE) * most

    def energy_at(self, k: int) -> float:
        """Share of the energy in the ``k`` leading components, at most all of ``energies``; 1.0 for ``F = 0``."""
        if self.total == 0:
            return 1.0
        return min(1.0, float(self.energies.cumsum(0)[:k][-1:].sum() / self.total))

    def _first_above(self, energy: float) -> int | None:
        if self.total == 0:
            return 1
        reached = (self.energies.cumsum(0) >= energy).nonzero()
        return int(reached[0]) + 1 if len(reached) else None


def exact_spectrum(features: Tensor) -> Spectrum:
    """All squared singular values of ``F (N, d_v)`` in float64, as eigenvalues of its smaller Gram matrix.

    Values below ``max(N, d_v) * 2e-16`` of the largest count as zero, so threshold 1 gives the numerical rank. Always
    on the CPU.
    """
    gram = gram_spectrum(features.cpu(), torch.float64)
    floor = gram.energies[0] * max(features.shape) * torch.finfo(torch.float64).eps
    energies = torch.where(gram.energies > floor, gram.energies, 0.0)
    return Spectrum(energies, float(energies.cumsum(0)[-1]))


def gram_spectrum(features: Tensor, dtype: torch.dtype) -> Spectrum:
    """All squared singular values of ``F (N, d_v)``, as eigenvalues of its smaller Gram matrix in ``dtype``.

    In float32, ``||F||_F^2`` must be in range. For ``F`` on a GPU, only the product runs there.
    """
    matrix = features.to(dtype)
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    if gram.device.type != "cpu":
        gram = gram.cpu().double()
    energies = torch.linalg.eigvalsh(gram).double().flip(0).clamp(min=0)
    total = float(gram.diagonal().sum(dtype=torch.float64))
    return Spectrum(energies, total, rounding=0.0 if dtype == torch.float64 else ROUNDING * total)


def randomized_spectrum(
    features: Tensor, rank: int = 300, power_iterations: int = 2, generator: torch.Generator | None = None
) -> Spectrum:
    """The leading ``rank`` squared singular values of ``F (N, d_v)``, by a randomised range finder.

    E-AdaPrune, Algorithm 2, re-orthonormalised between power steps. Up to rounding, the values do not exceed the true
    ones, so a rank read from them is not too small; the total is exact. Without power steps they are far too low.
    """
    matrix = features.float()
    probes = torch.randn(matrix.shape[1], rank, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ probes).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    projected = (basis.T @ matrix).cpu().double()
    energies = torch.linalg.eigvalsh(projected @ projected.T).flip(0).clamp(min=0)
    return Spectrum(energies, squared_norm(matrix))


def krylov_spectrum(features: Tensor, threshold: float, generator: torch.Generator | None = None) -> Spectrum | None:
    """Leading squared singular values of ``F (N, d_v)``, enough to settle the rank at ``threshold``; None if too many.

    A randomised block Krylov subspace of the smaller side. It costs as much as a range finder without power steps (two
    products with ``F`` per column) and is more accurate than one with two. It grows until the energy outside it cannot
    change the rank by more than 1 %: the ``k`` leading components hold at most their energy inside plus all energy
    outside (Ky Fan). Gives up once the subspace is expected to exceed `KRYLOV_SHARE`, as with power-law tails, or once
    rounding hides the remaining energy.

    ``||F||_F^2`` must be in float32's range.
    """
    matrix = features.float()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    total = squared_norm(matrix)
    side, length = matrix.shape
    widest = int(KRYLOV_SHARE * side)
    basis, projected = matrix.new_empty(widest, side), matrix.new_empty(widest, length)
    block = matrix @ torch.randn(length, KRYLOV_BLOCK, generator=generator).to(matrix)
    outside, tail, rounding = total, (1 - threshold) * total, ROUNDING * total
    for width in range(0, widest - KRYLOV_BLOCK + 1, KRYLOV_BLOCK):
        previous = basis[:width]
        for _ in range(2):  # once is not enough in float32, or for a rank-deficient block
            block = torch.linalg.qr(block - previous.T @ (previous @ block)).Q
        directions = block.T
        basis[width : width + KRYLOV_BLOCK] = directions
        rows = torch.mm(directions, matrix, out=projected[width : width + KRYLOV_BLOCK])
        last_outside, outside = outside, outside - squared_norm(rows)
        if outside < -rounding:  # the basis is not orthogonal
            return None
        if outside <= tail / 4:  # more cannot settle the rank
            inside = projected[: width + KRYLOV_BLOCK]
            energies = torch.linalg.eigvalsh((inside @ inside.T).cpu().double()).flip(0).clamp(min=0)
            leading = Spectrum(energies, total, max(outside, 0.0), rounding)
            if leading.settles(threshold):
                return leading
        blocks_left = (widest - width) // KRYLOV_BLOCK - 1
        if outside <= rounding or outside * (outside / last_outside) ** blocks_left > tail / 4:
            return None
        block = matrix @ rows.T
    return None


def squared_norm(matrix: Tensor) -> float:
    """``||F||_F^2`` in float64; on a GPU, row norms are computed in float32."""
    if matrix.device.type == "cpu":
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2)
    lengths = torch.linalg.vector_norm(matrix.float(), dim=1)
    return float(lengths.cpu().double().square().sum())


@torch.no_grad()
@full_float32()
def spectrum(
    features: Tensor,
    threshold: float,
    solver: Solver = "auto",
    rank: int = 300,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """A spectrum of ``F (N, d_v)`` that reaches ``threshold``: ``rank_at(threshold)`` is never None.

    - ``exact``: all singular values in float64.
    - ``rsvd``: the paper's Algorithm 2; doubles ``rank`` until it reaches the threshold. Falls back to ``exact`` for
      full rank or a threshold within rounding of 1.
    - ``auto``: the cheapest that settles the rank to 1 %: a Krylov subspace (large ``F``), all eigenvalues in float32,
      ``exact``.

    Raises:
        ValueError: ``F`` is not a non-empty finite matrix, or ``threshold`` is not in (0, 1].
    """
    if solver not in ("auto", "exact", "rsvd"):
        raise ValueError(f'solver must be "auto", "exact" or "rsvd", got {solver!r}')
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold!r}")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features must be a non-empty matrix, got shape {tuple(features.shape)}")
    require_finite("features", features)
    smaller_side = min(features.shape)
    if solver == "rsvd":
        while rank < smaller_side and threshold < 1 - ROUNDING:
            leading = randomized_spectrum(features, rank, power_iterations, generator)
            if leading.rank_at(threshold) is not None:
                return leading
            rank *= 2
    if solver == "auto" and 1e-18 < squared_norm(features) < 1e18:
        subspace = krylov_spectrum(features, threshold, generator) if smaller_side >= KRYLOV_FROM else None
        if subspace is not None:
            return subspace
        rounded = gram_spectrum(features, torch.float32)
        if rounded.settles(threshold):
            return rounded
    return exact_spectrum(features)


def fixed_count(budget: RatioBudget | TokensBudget, n: int) -> int:
    """Tokens to keep of an image with ``n`` tokens, at least 1; ``tokens`` may exceed ``n``."""
    if isinstance(budget, TokensBudget):
        return budget.keep
    # decimal, to round half up as the client wrote the number
    half_up = (Decimal(repr(budget.keep)) * n).quantize(Decimal(1), ROUND_HALF_UP)
    return max(int(half_up), 1)


def token_budget(
    budget: EnergyBudget | RatioBudget | TokensBudget,
    features: VisualFeatures,
    *,
    seed: int = 0,
    most: int | None = None,
) -> tuple[int, float | None]:
    """Tokens to keep, from 1 to ``most``, and the spectral energy at that count (None: not measured).

    For several tiles, energy is measured on the overview only; the share of its tokens that reaches the threshold is
    the share of all tokens to keep (E-AdaPrune on LLaVA-NeXT). ``min_tokens`` and ``max_tokens`` bound the total count;
    the energy is the overview's at the resulting share.

    Args:
        budget: a budget other than ``method``.
        features: the image's N visual tokens.
        seed: seed of the randomised solvers.
        most: most tokens that the method can keep; None: N.

    Raises:
        ValueError: the encoder features are not finite.
    """
    n = features.num_tokens
    most = n if most is None else min(most, n)
    if not isinstance(budget, EnergyBudget):
        return min(fixed_count(budget, n), most), None
    overview = features.overview
    encoder = features.encoder if overview is None else features.encoder[overview]
    m = len(encoder)
    measured = spectrum(
        encoder,
        budget.threshold,
        budget.solver,
        max(budget.rank, scale(min(budget.min_tokens, n), m, n)),  # so that rsvd covers the energy at min_tokens too
        budget.power_iterations,
        torch.Generator().manual_seed(seed),
    )
    rank = measured.rank_at(budget.threshold)
    assert rank is not None
    k = min(max(scale(rank, n, m), budget.min_tokens), budget.max_tokens or n, most)
    return k, measured.energy_at(max(scale(k, m, n), 1))


def scale(count: int, to: int, out_of: int) -> int:
    """``count / out_of * to``, rounded half up."""
    return (2 * count * to + out_of) // (2 * out_of)

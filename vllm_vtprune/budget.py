"""How many tokens to keep: spectral energy (E-AdaPrune, Eq. 4-6 and Algorithms 1 and 2) or a fixed count.

Features may lie on a GPU, most of which are slow in float64. There, products and orthogonal bases are in float32;
eigenvalues of what is small by then, sums, and all that has to be in float64 are the CPU's. What float32 may be off by
is the spectrum's ``rounding``, on either.
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
KRYLOV_SHARE = 0.375  # of the smaller side, that it may grow to: beyond, all eigenvalues cost less
ROUNDING = 4e-6  # share of the total energy by which float32 products may misplace a sum of eigenvalues
TOLERANCE = 0.01  # of the rank, that "auto" may leave open


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Squared singular values of a feature matrix, computed once for every question about its energy.

    Attributes:
        energies: ``(r,)`` float64 squared singular values on the CPU, largest first.
        total: ``||F||_F^2``, of which ``energies`` may be a leading part.
        missing: the most energy that the leading components of the matrix can hold beyond their ``energies``.
        rounding: how far a sum of ``energies`` may be off by rounding.
    """

    energies: Tensor
    total: float
    missing: float = 0.0
    rounding: float = 0.0

    def rank_at(self, threshold: float) -> int | None:
        """The fewest components that hold ``threshold`` of the energy; None if the known ones do not reach it."""
        return self._first_above(threshold * self.total)

    def settles(self, threshold: float) -> bool:
        """Whether the rank at ``threshold`` is known to 1 %, whatever ``missing`` and ``rounding`` are in truth."""
        wanted = threshold * self.total
        most = self._first_above(wanted + self.rounding)
        fewest = self._first_above(wanted - self.rounding - self.missing)
        return most is not None and fewest is not None and fewest >= (1 - TOLERANCE) * most

    def energy_at(self, k: int) -> float:
        """Share of the energy in the ``k`` leading components; 1.0 for a zero matrix.

        Where fewer than ``k`` are known, that of the known ones: never too high.
        """
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

    What lies below ``max(N, d_v) * 2e-16`` of the largest counts as zero, so that threshold 1 asks for the numerical
    rank. On a CPU, wherever the features are.
    """
    found = gram_spectrum(features.cpu(), torch.float64)
    floor = found.energies[0] * max(features.shape) * torch.finfo(torch.float64).eps
    energies = torch.where(found.energies > floor, found.energies, 0.0)
    return Spectrum(energies, float(energies.cumsum(0)[-1]))


def gram_spectrum(features: Tensor, dtype: torch.dtype) -> Spectrum:
    """All squared singular values of ``F (N, d_v)``, as eigenvalues of its smaller Gram matrix in ``dtype``.

    In float32, ``F`` must be of a size whose square float32 can hold. Of one on a GPU, only the product is computed
    there.
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

    E-AdaPrune's Algorithm 2, re-orthonormalised between power steps. But for rounding the values are never above the
    true ones, so a rank read from them is not too small, and the total is exact. Without power steps they are too low
    to be of use.
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
    """Leading squared singular values of ``F (N, d_v)``, enough of them to settle the rank at ``threshold``.

    A randomised block Krylov subspace of the smaller side: it costs as much as a range finder without power steps
    (two products with ``F`` for each column), and is more exact than one with two. It grows until the energy outside
    it is too little to change the rank by more than 1 %: the ``k`` leading components hold at most what they hold
    inside plus all that is outside (Ky Fan). None as soon as it looks as if it would have to grow beyond its share of
    the smaller side, as the flat tail of a power law makes it, or closer to ``threshold`` than rounding allows.

    ``F`` must be of a size whose square float32 can hold.
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
        known = basis[:width]
        for _ in range(2):  # once is not enough in float32, nor where a block has fewer directions than columns
            block = torch.linalg.qr(block - known.T @ (known @ block)).Q
        directions = block.T
        basis[width : width + KRYLOV_BLOCK] = directions
        rows = torch.mm(directions, matrix, out=projected[width : width + KRYLOV_BLOCK])
        was_outside, outside = outside, outside - squared_norm(rows)
        if outside < -rounding:  # some of it was counted twice
            return None
        if outside <= tail / 4:  # else no use to look
            inside = projected[: width + KRYLOV_BLOCK]
            energies = torch.linalg.eigvalsh((inside @ inside.T).cpu().double()).flip(0).clamp(min=0)
            found = Spectrum(energies, total, max(outside, 0.0), rounding)
            if found.settles(threshold):
                return found
        blocks_left = (widest - width) // KRYLOV_BLOCK - 1
        if outside <= rounding or outside * (outside / was_outside) ** blocks_left > tail / 4:
            return None
        block = matrix @ rows.T
    return None


def squared_norm(matrix: Tensor) -> float:
    """``||F||_F^2`` in float64; on a GPU the length of each row is in float32."""
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

    ``exact``: all singular values in float64. ``rsvd``: the paper's solver, with ``rank`` doubled until the threshold
    is reached; exact once that takes all components, or the threshold is within rounding of all energy. ``auto``: the
    cheapest that settles the rank to 1 %, of a Krylov subspace (where ``F`` is large), all eigenvalues in float32, and
    ``exact``.

    Raises:
        ValueError: when ``F`` is not a non-empty matrix of finite numbers, or ``threshold`` not in (0, 1].
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
            found = randomized_spectrum(features, rank, power_iterations, generator)
            if found.rank_at(threshold) is not None:
                return found
            rank *= 2
    if solver == "auto" and 1e-18 < squared_norm(features) < 1e18:
        subspace = krylov_spectrum(features, threshold, generator) if smaller_side >= KRYLOV_FROM else None
        if subspace is not None:
            return subspace
        rounded = gram_spectrum(features, torch.float32)
        if rounded.settles(threshold):
            return rounded
    return exact_spectrum(features)


def energy_rank(
    F: Tensor,
    threshold: float,
    solver: Solver = "auto",
    rank: int = 300,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> int:
    """``k*``: the fewest singular directions of ``F (N, d_v)`` that hold ``threshold`` of its energy (Eq. 6).

    ``F`` is taken as it is, neither centred nor normalised. A zero matrix has rank 1.

    Raises:
        ValueError: when ``F`` is not a non-empty matrix of finite numbers, or ``threshold`` not in (0, 1].
    """
    found = spectrum(F, threshold, solver, rank, power_iterations, generator).rank_at(threshold)
    assert found is not None
    return found


def spectral_energy(F: Tensor, k: int) -> float:
    """Share of the energy of ``F (N, d_v)`` in its ``k`` leading singular directions, between 0 and 1.

    Raises:
        ValueError: when ``F`` is not a non-empty matrix of finite numbers.
    """
    return spectrum(F, 1.0, "exact").energy_at(k)


def fixed_count(budget: RatioBudget | TokensBudget, n: int) -> int:
    """Tokens that a budget asks for, at least 1, of an image that has ``n`` or, with ``tokens``, fewer."""
    if isinstance(budget, TokensBudget):
        return budget.keep
    # decimal, so that a half is what it is in the number the client wrote
    half_up = (Decimal(repr(budget.keep)) * n).quantize(Decimal(1), ROUND_HALF_UP)
    return max(int(half_up), 1)


def token_budget(
    budget: EnergyBudget | RatioBudget | TokensBudget,
    features: VisualFeatures,
    *,
    seed: int = 0,
    most: int | None = None,
) -> tuple[int, float | None]:
    """Tokens to keep of ``features``, from 1 to ``most``, and the spectral energy at that count (None: not measured).

    Of an image of several tiles, energy is measured on the overview alone, and the share of its tokens that reaches the
    threshold is the share of all tokens to keep (E-AdaPrune on LLaVA-NeXT). ``min_tokens`` and ``max_tokens`` bound the
    count of all; the energy is the overview's at the share that they leave.

    Raises:
        ValueError: when the encoder features are not finite.
    """
    n = features.num_tokens
    most = n if most is None else min(most, n)
    if not isinstance(budget, EnergyBudget):
        return min(fixed_count(budget, n), most), None
    overview = features.overview
    measured_on = features.encoder if overview is None else features.encoder[overview]
    m = len(measured_on)
    measured = spectrum(
        measured_on,
        budget.threshold,
        budget.solver,
        max(budget.rank, share(min(budget.min_tokens, n), m, n)),  # so that rsvd knows the energy at min_tokens too
        budget.power_iterations,
        torch.Generator().manual_seed(seed),
    )
    wanted = measured.rank_at(budget.threshold)
    assert wanted is not None
    k = min(max(share(wanted, n, m), budget.min_tokens), budget.max_tokens or n, most)
    return k, measured.energy_at(max(share(k, m, n), 1))


def share(part: int, of: int, whole: int) -> int:
    """``part / whole`` of ``of``, rounded half up."""
    return (2 * part * of + whole) // (2 * whole)

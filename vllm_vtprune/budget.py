"""How many tokens to keep: spectral energy (E-AdaPrune, Eq. 4-6 and Algorithms 1 and 2) or a fixed count."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures, require_finite
from vllm_vtprune.policy import EnergyBudget, RatioBudget, TokensBudget

Solver: TypeAlias = Literal["auto", "exact", "rsvd"]

EXACT_UP_TO = 1024  # smaller side of F up to which "auto" takes the exact solver


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Squared singular values of a feature matrix, computed once for every question about its energy.

    Attributes:
        energies: ``(r,)`` float64 squared singular values on the CPU, largest first.
        total: ``||F||_F^2``, of which ``energies`` may be a leading part.
    """

    energies: Tensor
    total: float

    def rank_at(self, threshold: float) -> int | None:
        """The fewest components that hold ``threshold`` of the energy; None if the known ones do not reach it."""
        if self.total == 0:
            return 1
        reached = (self.energies.cumsum(0) / self.total >= threshold).nonzero()
        return int(reached[0]) + 1 if len(reached) else None

    def energy_at(self, k: int) -> float:
        """Share of the energy in the ``k`` leading components; 1.0 for a zero matrix."""
        if self.total == 0:
            return 1.0
        return min(1.0, float(self.energies.cumsum(0)[:k][-1:].sum() / self.total))


def exact_spectrum(features: Tensor) -> Spectrum:
    """All squared singular values of ``F (N, d_v)``, as eigenvalues of its smaller Gram matrix.

    The Gram matrix is formed in float64. In float32 its eigenvalues carry an error of about 1e-7 of the largest, which
    is harmless at a threshold of 0.99 but not near 1; in float64 that floor is ``max(N, d_v) * 2e-16``, and what lies
    below it counts as zero, so that threshold 1 asks for the numerical rank.

    Raises:
        ValueError: when ``F`` is not a non-empty matrix of finite numbers.
    """
    matrix = _checked(features).double()
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    energies = torch.linalg.eigvalsh(gram).flip(0).cpu()
    floor = energies[0] * max(rows, columns) * torch.finfo(torch.float64).eps
    energies = torch.where(energies > floor, energies, 0.0)
    return Spectrum(energies, float(energies.cumsum(0)[-1]))


def randomized_spectrum(
    features: Tensor, rank: int = 300, power_iterations: int = 2, generator: torch.Generator | None = None
) -> Spectrum:
    """The leading ``rank`` squared singular values of ``F (N, d_v)``, by a randomised range finder.

    E-AdaPrune's Algorithm 2, re-orthonormalised between power steps. The values are never above the true ones, so a
    rank read from them is never too small, and the total is exact. Without power steps they are too low to be of use.

    Raises:
        ValueError: when ``F`` is not a non-empty matrix of finite numbers.
    """
    matrix = _checked(features).float()
    probes = torch.randn(matrix.shape[1], rank, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probes).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    projected = (basis.T @ matrix).double()
    energies = torch.linalg.eigvalsh(projected @ projected.T).flip(0).clamp(min=0).cpu()
    return Spectrum(energies, float(matrix.double().square().sum()))


def spectrum(
    features: Tensor,
    threshold: float,
    solver: Solver = "auto",
    rank: int = 300,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """A spectrum of ``F (N, d_v)`` that reaches ``threshold``: ``rank_at(threshold)`` is never None.

    ``rsvd`` doubles ``rank`` until the threshold is reached, and turns to the exact solver once that takes all
    components. ``auto`` is ``exact`` up to a smaller side of 1024, where it is the faster one, and ``rsvd`` above.
    """
    if solver not in ("auto", "exact", "rsvd"):
        raise ValueError(f'solver must be "auto", "exact" or "rsvd", got {solver!r}')
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold!r}")
    smaller_side = min(_checked(features).shape)
    if solver == "rsvd" or (solver == "auto" and smaller_side > EXACT_UP_TO):
        while rank < smaller_side:
            found = randomized_spectrum(features, rank, power_iterations, generator)
            if found.rank_at(threshold) is not None:
                return found
            rank *= 2
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
    """Share of the energy of ``F (N, d_v)`` in its ``k`` leading singular directions, between 0 and 1."""
    return exact_spectrum(F).energy_at(k)


def token_budget(
    budget: EnergyBudget | RatioBudget | TokensBudget, features: VisualFeatures, *, seed: int = 0
) -> tuple[int, float | None]:
    """Tokens to keep of ``features``, from 1 to N, and the spectral energy at that count (None: not measured).

    Raises:
        ValueError: when the encoder features are not finite.
    """
    n = features.num_tokens
    if isinstance(budget, TokensBudget):
        return min(budget.keep, n), None
    if isinstance(budget, RatioBudget):
        # decimal, so that a half is what it is in the number the client wrote
        half_up = (Decimal(repr(budget.keep)) * n).quantize(Decimal(1), ROUND_HALF_UP)
        return min(max(int(half_up), 1), n), None
    measured = spectrum(
        features.encoder,
        budget.threshold,
        budget.solver,
        max(budget.rank, min(budget.min_tokens, n)),  # so that the energy at min_tokens is known too
        budget.power_iterations,
        torch.Generator().manual_seed(seed),
    )
    wanted = measured.rank_at(budget.threshold)
    assert wanted is not None
    k = min(max(wanted, budget.min_tokens), budget.max_tokens or n, n)
    return k, measured.energy_at(k)


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features must be a non-empty matrix, got shape {tuple(features.shape)}")
    require_finite("features", features)
    return features

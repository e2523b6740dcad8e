"""Rank and energy of a feature matrix, read from its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_vtprune.budget import Solver, spectrum


def energy_rank(
    F: Tensor,
    threshold: float,
    solver: Solver = "auto",
    rank: int = 300,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> int:
    """``k*``: the fewest singular directions of ``F (N, d_v)`` with a ``threshold`` share of its energy (Eq. 6)."""
    fewest = spectrum(F, threshold, solver, rank, power_iterations, generator).rank_at(threshold)
    assert fewest is not None
    return fewest


def spectral_energy(F: Tensor, k: int) -> float:
    """Share of the energy of ``F (N, d_v)`` in its ``k`` leading singular directions, in [0, 1]."""
    return spectrum(F, 1.0, "exact").energy_at(k)

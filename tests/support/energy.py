"""Rank and energy of a feature matrix, read from its spectrum."""

from typing import Any

from torch import Tensor

from vllm_vtprune.budget import spectrum


def energy_rank(F: Tensor, threshold: float, *options: Any, **named: Any) -> int:
    """``k*``: the fewest singular directions of ``F (N, d_v)`` with a ``threshold`` share of its energy (Eq. 6).

    The options are those of `spectrum`.
    """
    fewest = spectrum(F, threshold, *options, **named).rank_at(threshold)
    assert fewest is not None
    return fewest


def spectral_energy(F: Tensor, k: int) -> float:
    """Share of the energy of ``F (N, d_v)`` in its ``k`` leading singular directions, in [0, 1]."""
    return spectrum(F, 1.0, "exact").energy_at(k)

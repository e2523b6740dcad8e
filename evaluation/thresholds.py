"""Find energy thresholds with a given mean token count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np

from vllm_vtprune.budget import Spectrum, scale

STEPS = 60  # bisections, to float64's precision
DIGITS = 9  # digits of a threshold; further ones depend on the machine


@dataclass(frozen=True)
class Measured:
    """The spectrum of one picture.

    Attributes:
        spectrum: exact spectrum of the measured tokens.
        measured: number of measured tokens; for tiles, the overview's.
        tokens: all visual tokens of the picture.
        weight: weight in means: its number of questions.
    """

    spectrum: Spectrum
    measured: int
    tokens: int
    weight: int = 1

    def kept(self, threshold: float, least: int = 1) -> int:
        """Tokens kept by an energy budget that keeps at least ``least``."""
        rank = self.spectrum.rank_at(threshold) or len(self.spectrum.energies)
        return min(self.tokens, max(least, scale(rank, self.tokens, self.measured)))


def mean_kept(pictures: Sequence[Measured], threshold: float, least: int = 1) -> float:
    """Mean tokens kept by an energy budget, over questions."""
    weights = [picture.weight for picture in pictures]
    return float(np.average([picture.kept(threshold, least) for picture in pictures], weights=weights))


def threshold_for(pictures: Sequence[Measured], mean: float, least: int = 1) -> float | None:
    """The energy threshold whose mean token count is nearest to ``mean``.

    As in E-AdaPrune's comparison with fixed budgets: one threshold for all pictures, found on pictures outside the
    test.

    Args:
        pictures: a sample of pictures.
        mean: target mean tokens per picture.
        least: fewest tokens of a picture.

    Returns:
        None if no threshold is within half a token, because energy budgets cannot exceed the features' rank.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if mean_kept(pictures, middle, least) < mean:
            low = middle
        else:
            high = middle
    unit = 10.0**-DIGITS
    steps = (floor(high / unit), ceil(high / unit), floor(low / unit))  # what is kept may change in between
    candidates = [threshold for step in steps if 0 < (threshold := round(step * unit, DIGITS)) <= 1]
    nearest = min(candidates, key=lambda threshold: abs(mean_kept(pictures, threshold, least) - mean))
    return nearest if abs(mean_kept(pictures, nearest, least) - mean) <= 0.5 else None

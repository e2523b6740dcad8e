"""Energy thresholds that keep a wanted number of tokens on average, and what they keep of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np

from vllm_vtprune.budget import Spectrum, scale

STEPS = 60  # bisections; float64 holds no more
DIGITS = 9  # of a threshold: the rest depends on the machine


@dataclass(frozen=True)
class Measured:
    """The spectrum of one picture.

    Attributes:
        spectrum: exact, of the tokens that energy is measured on.
        measured: how many those are: of a picture in tiles, the overview's.
        tokens: of the whole picture.
        weight: how often it counts in a mean: the questions about it.
    """

    spectrum: Spectrum
    measured: int
    tokens: int
    weight: int = 1

    def kept(self, threshold: float) -> int:
        """The tokens that an energy budget without other bounds keeps."""
        rank = self.spectrum.rank_at(threshold) or len(self.spectrum.energies)
        return scale(rank, self.tokens, self.measured)


def mean_kept(pictures: Sequence[Measured], threshold: float) -> float:
    """The tokens that an energy budget keeps of a picture, on average over questions."""
    weights = [picture.weight for picture in pictures]
    return float(np.average([picture.kept(threshold) for picture in pictures], weights=weights))


def threshold_for(pictures: Sequence[Measured], mean: float) -> float | None:
    """The energy threshold whose budgets are nearest to ``mean`` tokens on average.

    As E-AdaPrune compares with fixed budgets: the threshold is one for all pictures, and found on pictures that are not
    those of the test.

    Args:
        pictures: some of a kind.
        mean: tokens of a picture.

    Returns:
        None where no threshold leads there within half a token: no energy budget is above the features' rank.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if mean_kept(pictures, middle) < mean:
            low = middle
        else:
            high = middle
    unit = 10.0**-DIGITS
    steps = (floor(high / unit), ceil(high / unit), floor(low / unit))  # what is kept may change in between
    candidates = [threshold for step in steps if 0 < (threshold := round(step * unit, DIGITS)) <= 1]
    found = min(candidates, key=lambda threshold: abs(mean_kept(pictures, threshold) - mean))
    return found if abs(mean_kept(pictures, found) - mean) <= 0.5 else None

"""Energy thresholds that keep a wanted number of tokens on average, and what they keep of each picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.budget import Spectrum

STEPS = 60  # bisections; float64 holds no more


def counts(spectra: Sequence[Spectrum], threshold: float) -> NDArray[np.int64]:
    """(number of pictures,): the tokens that an energy budget without other bounds keeps of each."""
    return np.array([spectrum.rank_at(threshold) or len(spectrum.energies) for spectrum in spectra])


def threshold_for(spectra: Sequence[Spectrum], mean: float) -> float | None:
    """The energy threshold whose budgets are nearest to ``mean`` tokens on average.

    As E-AdaPrune compares with fixed budgets: the threshold is one for all pictures, and found on pictures that are not
    those of the test.

    Args:
        spectra: exact ones, of some pictures.
        mean: tokens of a picture.

    Returns:
        None where no threshold leads there within half a token: no energy budget is above the features' rank.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if counts(spectra, middle).mean() < mean:
            low = middle
        else:
            high = middle
    found = high if low == 0 else min((low, high), key=lambda threshold: abs(counts(spectra, threshold).mean() - mean))
    return found if abs(counts(spectra, found).mean() - mean) <= 0.5 else None

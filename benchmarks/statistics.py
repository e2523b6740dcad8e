"""Statistics of paired measurements."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedRatio:
    """A ratio of two quantities measured in pairs.

    Attributes:
        value: the geometric mean of the pairs' ratios.
        low: lower end of its 95 % bootstrap interval.
        high: upper end.
        pairs: how many pairs.
    """

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> PairedRatio:
    """The ratio of two paired samples, with a percentile bootstrap over the pairs.

    Raises:
        ValueError: the samples are empty, differ in length, or hold a number that is not positive.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"expected two samples of one length, got {len(numerators)} and {len(denominators)} numbers")
    if min(*numerators, *denominators) <= 0:
        raise ValueError("expected positive numbers")
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    generator = random.Random(seed)
    means = sorted(sum(generator.choices(logs, k=len(logs))) / len(logs) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return PairedRatio(math.exp(sum(logs) / len(logs)), math.exp(low), math.exp(high), len(logs))

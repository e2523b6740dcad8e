"""Statistics of paired measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class PairedRatio:
    """A ratio of two quantities measured in pairs.

    Attributes:
        value: the geometric mean of the pairs' ratios.
        low: lower end of its 95 % interval; 0 for one pair, which has no spread.
        high: upper end; infinite for one pair.
        pairs: how many pairs.
    """

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> PairedRatio:
    """The ratio of two paired samples, with Student's interval of the logarithms over the pairs.

    A bootstrap over so few pairs would give intervals that are too narrow.

    Raises:
        ValueError: the samples are empty, differ in length, or contain a number that is not positive.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"expected two samples of one length, got {len(numerators)} and {len(denominators)} numbers")
    if min(*numerators, *denominators) <= 0:
        raise ValueError("expected positive numbers")
    logs = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    mean, pairs = statistics.fmean(logs), len(logs)
    if pairs == 1:
        return PairedRatio(math.exp(mean), 0.0, math.inf, pairs)
    half = student.ppf(0.975, pairs - 1) * statistics.stdev(logs) / math.sqrt(pairs)
    return PairedRatio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), pairs)

"""The statistics behind the numbers in the documentation."""

import math
import random

import pytest

from vllm_vtprune_evaluation.load.ratios import paired_ratio


def test_pairing_removes_what_both_sides_share() -> None:
    drift = [1.0, 3.0, 9.0, 27.0, 81.0]
    ratio = paired_ratio([1.1 * value for value in drift], drift)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio.pairs == 5


def test_the_interval_holds_the_geometric_mean_and_widens_with_the_spread() -> None:
    narrow = paired_ratio([1.0, 1.1, 0.9, 1.05, 0.95], [1.0] * 5)
    wide = paired_ratio([1.0, 2.0, 0.5, 1.5, 0.7], [1.0] * 5)
    assert narrow.value == pytest.approx(math.prod([1.0, 1.1, 0.9, 1.05, 0.95]) ** 0.2)
    for ratio in (narrow, wide):
        assert ratio.low < ratio.value < ratio.high
    assert wide.high / wide.low > narrow.high / narrow.low


@pytest.mark.parametrize("pairs", [3, 4, 10])
def test_the_interval_holds_the_truth_as_often_as_it_says(pairs: int) -> None:
    """Of ratios whose logarithms are normal; a bootstrap of three pairs would in 75 of 100 cases."""
    noise = random.Random(pairs)
    held = 0
    for _ in range(400):
        ratio = paired_ratio([1.2 * math.exp(noise.gauss(0, 0.1)) for _ in range(pairs)], [1.0] * pairs)
        held += ratio.low <= 1.2 <= ratio.high
    assert 0.92 <= held / 400 <= 0.98


def test_one_pair_says_nothing_of_the_spread() -> None:
    ratio = paired_ratio([3.0], [2.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 0.0, math.inf))


@pytest.mark.parametrize(("left", "right"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([-1.0], [1.0])])
def test_samples_without_a_ratio_are_refused(left: list[float], right: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        paired_ratio(left, right)

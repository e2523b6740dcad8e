"""PyramidDrop: fewer tokens at each quarter of the layers.

"PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction". Where a quarter
begins, its first layer's attention ranks the tokens that enter, and those that leave do not enter that layer.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor

from torch import Tensor

from vllm_vtprune.budget import token_budget
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import EnergyBudget
from vllm_vtprune_evaluation.in_llm.pruning import Budget, Entrance, Pruning, strongest

FRACTIONS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
"""Of all tokens, in the second, third and last quarter of the layers."""


@dataclass(frozen=True)
class PyramidDrop(Pruning):
    """Three times, the tokens stay to which the last token of the prompt pays most attention.

    With a budget, all three fractions are scaled by the number that makes the mean over the layers k, as near as whole
    tokens allow; none goes above 1, and one token always stays. The first quarter sees all N, so no mean is below about
    N/4: a fixed budget below is an error, an energy budget is raised to it, image by image.

    Attributes:
        budget: k, the mean over the layers; None for the paper's own fractions.
    """

    budget: Budget | None = None

    def schedule(self, features: VisualFeatures, layers: int) -> list[int]:
        widths = quarters(layers)
        n = features.num_tokens
        scale = Fraction(1)
        if self.budget is not None:
            k, _ = token_budget(self.budget, features)
            scale = scale_for(Fraction(k * layers, n), widths)
            if scale < 0:
                if not isinstance(self.budget, EnergyBudget):
                    least = least_mean(n, layers)
                    raise ValueError(
                        f"budget must keep at least {least} of {n} tokens, because the first {widths[0]} of {layers} "
                        f"layers see all, got {k} from {self.budget!r}"
                    )
                scale = Fraction(0)
        counts, carry = [n], Fraction(0)
        for width, fraction in zip(widths[1:], FRACTIONS, strict=True):
            exact = min(scale * fraction, Fraction(1)) * n
            count = min(max(floor(exact + carry / width + Fraction(1, 2)), 1), counts[-1])
            carry += width * (exact - count)  # what rounding took from the mean goes to the next
            counts.append(count)
        return [count for count, width in zip(counts, widths, strict=True) for _ in range(width)]

    def choose(self, entrance: Entrance, count: int) -> Tensor:
        return strongest(entrance.attention_here, count)


def least_mean(tokens: int, layers: int) -> int:
    """The least mean over the layers that can be had: the first quarter of them sees all tokens."""
    return ceil(Fraction(quarters(layers)[0] * tokens, layers))


def quarters(layers: int) -> list[int]:
    """The layers in each of the four parts; their borders lie at quarters of ``layers``, rounded half up.

    Raises:
        ValueError: when there are fewer than four.
    """
    if layers < 4:
        raise ValueError(f"the model must have at least 4 layers, one for each part of the pyramid, got {layers}")
    borders = [(quarter * layers + 2) // 4 for quarter in range(5)]
    return [end - begin for begin, end in pairwise(borders)]


def scale_for(wanted: Fraction, widths: list[int]) -> Fraction:
    """What to multiply the fractions by, so that the layers see together ``wanted`` times all tokens.

    Fractions are cut at 1. Negative where the first part alone sees more than that.
    """
    rest = wanted - widths[0]
    for i, fraction in enumerate(FRACTIONS):
        scale = rest / sum(w * f for w, f in zip(widths[1 + i :], FRACTIONS[i:], strict=True))
        if scale * fraction <= 1:
            return scale
        rest -= widths[1 + i]  # this one is cut
    return 1 / FRACTIONS[-1]

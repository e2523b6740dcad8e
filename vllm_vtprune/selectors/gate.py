"""The gate: how a token's likeness to the text becomes a weight of its residual energy (ResPrune, Eq. 13-15).

The paper asks for a non-negative weight from a monotonically increasing function of strength alpha. It does not say how
a cosine, which may be negative, becomes one. Both forms here are ours:

- ``minmax``, the default: cosines scaled over the image's tokens to 0.1..1. Every token keeps at least a tenth, so
  residual energy still decides among tokens that the text does not point at. Where cosines differ by less than 0.05
  over the image, the text says little, and the gate shrinks to 1: equal cosines give exactly 1.
- ``clip``: cosines cut to 1e-6..1. A token at a cosine of 0 or below, often most of an image, is all but thrown out.
  It was the default before, and is kept for the ablation.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vllm_vtprune.lazy import Tensor

LEAST_WEIGHT = 0.1  # of the token least like the text, before alpha
LEAST_SPREAD = 0.05  # of cosines over an image, from which on the gate has its whole effect
LEAST_CLIPPED = 1e-6


def minmax(relevance: Tensor) -> Tensor:
    """``(N,)`` cosines in float64 -> weights from ``LEAST_WEIGHT`` to 1; the largest cosine's weight is 1."""
    below = relevance.amax() - relevance
    return 1 - (1 - LEAST_WEIGHT) * below / below.amax().clamp(min=LEAST_SPREAD)


def clip(relevance: Tensor) -> Tensor:
    """``(N,)`` cosines in float64 -> weights from ``LEAST_CLIPPED`` to 1."""
    return relevance.clamp(LEAST_CLIPPED, 1.0)


GATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"minmax": minmax, "clip": clip})


def gate(relevance: Tensor, form: str, alpha: float) -> Tensor:
    """``(N,)`` weights in float64, above 0 and at most 1, that grow with the ``relevance (N,)``, cosines.

    Args:
        relevance: of each token to the text, -1..1.
        form: a key of `GATES`.
        alpha: strength; 0 for none.
    """
    return GATES[form](relevance.double()).pow(alpha)

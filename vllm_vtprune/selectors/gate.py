"""The gate: a weight of a token's residual energy from its similarity to the text (ResPrune, Eq. 13-15).

The paper requires a non-negative, monotonically increasing weight with strength alpha, but does not define it for
negative cosines. Both forms are ours:

- ``minmax``, the default: cosines scaled to 0.1..1 over the image's tokens. Residual energy still ranks tokens that are
  unlike the text. If cosines spread by less than 0.05 over the image, the gate approaches 1; equal cosines give 1.
- ``clip``: cosines clipped to 1e-6..1. Almost excludes tokens with a cosine of 0 or less, often most of an image. Kept
  for the ablation.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vllm_vtprune.lazy import Tensor

LEAST_WEIGHT = 0.1  # weight of the token least similar to the text, before alpha
LEAST_SPREAD = 0.05  # spread of cosines over an image from which the gate has its full effect
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
    """``(N,)`` weights in (0, 1], float64, increasing with relevance.

    Args:
        relevance: ``(N,)`` cosine of each token with the text.
        form: a key of `GATES`.
        alpha: strength; 0 gives weights of 1.
    """
    return GATES[form](relevance.double()).pow(alpha)

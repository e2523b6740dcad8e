"""Divide one budget over the images of a request, by their spectral energy (`budget.scope` "request").

The singular directions of all images are pooled, and the ones with the most energy are kept: reverse water-filling,
which loses the least energy in total among all divisions. An image with little in it has few strong directions, so a
blank page leaves its share to a chart. The energies are those of E-AdaPrune (`vllm_vtprune.budget`); the division is
ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vtprune.budget import fixed_count, gram_spectrum, squared_norm
from vllm_vtprune.features import VisualFeatures, require_finite
from vllm_vtprune.options import RatioBudget, TokensBudget
from vllm_vtprune.precision import full_float32
from vllm_vtprune.selectors.method import Method

FLOAT32_RANGE = 1e-18, 1e18
"""Total energies whose sums are in the range of float32."""
NOISE = 1e-6
"""Energies below this share of an image's largest are rounding errors."""


@dataclass(frozen=True, eq=False)
class Energies:
    """The spectral energies of one image.

    Attributes:
        num_tokens: visual tokens of the image.
        grids: see `VisualFeatures`.
        energies: ``(r,)`` float32 squared singular values of the encoder features, largest first, on the CPU.
    """

    num_tokens: int
    grids: tuple[tuple[int, int], ...]
    energies: Tensor

    @classmethod
    @torch.no_grad()
    @full_float32()
    def of(cls, features: VisualFeatures) -> Energies:
        """Measure an image.

        Args:
            features: the image's N visual tokens, on any device.

        Raises:
            ValueError: the encoder features are not finite.
        """
        features = features.without_duplicates()
        require_finite("encoder", features.encoder)
        least, most = FLOAT32_RANGE
        dtype = torch.float32 if least < squared_norm(features.encoder) < most else torch.float64
        matrix = features.encoder if dtype == torch.float32 else features.encoder.cpu()  # GPUs are slow in float64
        return cls(features.num_tokens, features.grids, gram_spectrum(matrix, dtype).energies.float())


def allot(budget: RatioBudget | TokensBudget, images: Sequence[Energies], method: type[Method]) -> list[int]:
    """Tokens to keep of each image; the sum is the budget's, unless the method can keep only fewer.

    Args:
        budget: a budget for all images together, of at least one token for each.
        images: the images, in prompt order; between equal energies, earlier images come first.
        method: bounds the tokens of each image.
    """
    most = [method.max_keep(image) for image in images]
    total = min(fixed_count(budget, sum(image.num_tokens for image in images)), sum(most))
    least = min(budget.min_tokens, total // len(images))
    counts = [min(least, limit) for limit in most]
    # where energies are equal or used up, one token of each image in turn
    directions = sorted(
        (-energy, token, index)
        for index, image in enumerate(images)
        for token, energy in enumerate(_padded(image.energies, most[index]))
        if token >= counts[index]
    )
    for _, _, index in directions[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _padded(energies: Tensor, length: int) -> list[float]:
    """The first ``length`` energies; zeros where there are fewer. Rounding noise counts as zero."""
    leading = torch.where(energies > NOISE * energies[:1], energies, 0.0)[:length].tolist()
    return leading + [0.0] * (length - len(leading))

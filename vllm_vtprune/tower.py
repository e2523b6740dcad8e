"""What a vision tower is to the rest of the package: images in, `VisualFeatures` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from vllm_vtprune.features import PreparedImage, VisualFeatures

Weights = Literal["checkpoint", "dummy"]


class TowerError(RuntimeError):
    """The vision tower cannot be built: the model is not supported, or its files are incomplete or do not fit."""


class VisionTower(Protocol):
    """A model's vision encoder and projector, in the API process. Safe to use from several threads.

    Attributes:
        device: where images are encoded; features stay there.
        dtype: of the features.
        weights: "dummy" for random ones, as with ``load_format="dummy"``.
        num_parameters: of encoder and projector.
        nbytes: of those parameters.
    """

    device: torch.device
    dtype: torch.dtype
    weights: Weights
    num_parameters: int
    nbytes: int

    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """Features of each image, each in memory of its own.

        An image that is encoded alone and in a batch may differ in the last bits: matrix products of other sizes add
        up in another order.
        """

    def token_rows(self, token_ids: Sequence[int]) -> Tensor:
        """``(M, d)`` rows of the language model's input embedding table, in order, on `device` in `dtype`.

        Raises:
            ValueError: an id is outside of the table.
        """

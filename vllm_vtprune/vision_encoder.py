"""The interface of a vision encoder: images in, `VisualFeatures` out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from vllm_vtprune.features import PreparedImage, VisualFeatures

Weights = Literal["checkpoint", "dummy"]
"""Where weights come from; "dummy": random ones, as with ``load_format="dummy"``."""


class EncoderError(RuntimeError):
    """The vision encoder cannot be loaded: unsupported model or device, incomplete or mismatched files."""


class VisionEncoder(Protocol):
    """A model's vision encoder and projector, in the API process. Thread-safe.

    Attributes:
        device: device of the encoder and of its results.
        dtype: dtype of the features.
        num_parameters: parameter count of encoder and projector.
    """

    device: torch.device
    dtype: torch.dtype
    num_parameters: int

    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """Features of each image, in separate memory.

        Results may differ in the last bits between batch sizes, because matrix products sum in another order.
        """

    def token_rows(self, token_ids: Sequence[int]) -> Tensor:
        """``(M, d)`` rows of the language model's input embedding table, in order, on `device` in `dtype`.

        Raises:
            ValueError: an id is out of range.
        """

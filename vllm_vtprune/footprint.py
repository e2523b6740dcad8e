"""GPU memory of a model's vision encoder, computed from its config without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from vllm_vtprune.devices import Footprint
from vllm_vtprune.selectors.pivots import peak_bytes

BATCH_PATCHES = 16_384
"""Most patches per run of the encoder, unless one image has more: bounds its memory."""

HEAD = 128
"""Largest width of a key."""


@dataclass(frozen=True)
class Shape:
    """The dimensions that determine a vision encoder's memory.

    Attributes:
        parameters: parameter count of encoder and connector.
        hidden, intermediate: width of the encoder's layers, and of their feed-forward part.
        values: pixel values per patch.
        width: width of an embedding.
        merge: patches per token in either direction.
        deepstack: additional planes of embeddings.
        patches: most patches of an image, if more than its tokens have; else 0.
    """

    parameters: int
    hidden: int
    intermediate: int
    values: int
    width: int
    merge: int = 1
    deepstack: int = 0
    patches: int = 0

    @classmethod
    def of(
        cls,
        vision: Any,
        *,
        parameters: int,
        width: int,
        merge: int,
        deepstack: int,
        patches: int = 0,
        intermediate: int = 0,
    ) -> Shape:
        """Read from an encoder's config; other arguments as the attributes, ``intermediate=0``: from the config."""
        values = 3 * _side(vision.patch_size) ** 2 * getattr(vision, "temporal_patch_size", 1)
        hidden = vision.hidden_size
        intermediate = intermediate or getattr(vision, "intermediate_size", 4 * hidden)
        return cls(parameters, hidden, intermediate, values, width, merge, deepstack, patches)

    @property
    def columns(self) -> int:
        """Values stored per token: embeddings, connector input, keys."""
        return self.width * (1 + self.deepstack) + self.hidden + HEAD

    def patch_bytes(self, dtype: torch.dtype) -> int:
        """Peak bytes per patch: pixels, and the larger of feed-forward part and rotary embedding in float32.

        Factors are fitted to torch's allocations (tests/core/test_devices.py). Attention is not materialised.
        """
        exact = torch.float32.itemsize
        feed_forward = dtype.itemsize * (8 * self.hidden + 3.6 * self.intermediate)
        rotation = self.hidden * (9 * dtype.itemsize + 6 * exact)
        return ceil(max(feed_forward, rotation) + self.values * (dtype.itemsize + exact))


def footprint(shape: Shape, dtype: torch.dtype, *, tokens: int, batch: int, held: int) -> Footprint:
    """GPU memory of one process that encodes, under policies with ``features: projected``.

    ``both`` needs up to ``8 * tokens * shape.hidden`` bytes more: 0.16 GiB for 16,384 tokens of Qwen2.5-VL-7B.

    Args:
        shape: the encoder's dimensions.
        dtype: the model's dtype.
        tokens: visual tokens of the largest image that the image processor makes.
        batch: most images per batch.
        held: bytes of features that stay on the GPU.
    """
    patches = shape.patches or tokens * shape.merge**2
    forward = min(batch * patches, max(patches, BATCH_PATCHES))
    features = dtype.itemsize * tokens * shape.columns
    finished = batch * features * (1 - forward / (batch * patches))  # features of all earlier runs of the batch
    return Footprint(
        weights=shape.parameters * dtype.itemsize,
        encoding=forward * shape.patch_bytes(dtype) + ceil(finished),
        selection=features + peak_bytes(tokens, shape.width, tokens),
        held=held,
    )


def _side(size: int | Sequence[int]) -> int:
    """Side of a square; some configs give both sides."""
    return size if isinstance(size, int) else size[0]

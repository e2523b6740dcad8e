"""How much of a GPU's memory a model's vision tower takes, from the shapes in its config: no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from vllm_vtprune.placement import Footprint
from vllm_vtprune.selectors.pivots import peak_bytes

BATCH_PATCHES = 16_384
"""Most patches of one forward, or else one image: bounds its memory, which grows with them."""

HEAD = 128
"""Numbers of a key, at most."""


@dataclass(frozen=True)
class Shape:
    """What the memory of a vision encoder follows from.

    Attributes:
        parameters: of encoder and connector.
        hidden, intermediate: width of the encoder's layers, and of their feed-forward part.
        values: of the pixels of a patch.
        width: of an embedding.
        merge: patches of a token in either direction.
        deepstack: further planes of embeddings.
        patches: the most that an image has, where they are more than those of its tokens; else 0.
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
        """Of an encoder with this config; the others as the attributes, `intermediate` 0 for that of the config."""
        values = 3 * _side(vision.patch_size) ** 2 * getattr(vision, "temporal_patch_size", 1)
        hidden = vision.hidden_size
        intermediate = intermediate or getattr(vision, "intermediate_size", 4 * hidden)
        return cls(parameters, hidden, intermediate, values, width, merge, deepstack, patches)

    @property
    def columns(self) -> int:
        """Numbers kept of a token: embeddings, what feeds the connector, a head's keys."""
        return self.width * (1 + self.deepstack) + self.hidden + HEAD

    def patch_bytes(self, dtype: torch.dtype) -> int:
        """The most that a patch takes: its pixels, and it in a layer's feed-forward part, or rotated in float32.

        The factors are fitted to what torch allocates (tests/core/test_placement.py); attention is not materialised.
        """
        exact = torch.float32.itemsize
        feed_forward = dtype.itemsize * (8 * self.hidden + 3.6 * self.intermediate)
        rotation = self.hidden * (9 * dtype.itemsize + 6 * exact)
        return ceil(max(feed_forward, rotation) + self.values * (dtype.itemsize + exact))


def footprint(shape: Shape, dtype: torch.dtype, *, tokens: int, batch: int, held: int) -> Footprint:
    """The GPU memory of one API process, under policies whose ``features`` is ``projected``.

    ``both`` takes ``8 * tokens * shape.hidden`` bytes more at most, 0.16 GiB for 16,384 tokens of Qwen2.5-VL-7B.

    Args:
        shape: of the encoder.
        dtype: the model's.
        tokens: of the largest image that the image processor makes.
        batch: most images that are encoded together.
        held: bytes of features that stay on the GPU.
    """
    patches = shape.patches or tokens * shape.merge**2
    forward = min(batch * patches, max(patches, BATCH_PATCHES))
    features = dtype.itemsize * tokens * shape.columns
    finished = batch * features * (1 - forward / (batch * patches))  # by the time of the last forward
    return Footprint(
        weights=shape.parameters * dtype.itemsize,
        encoding=forward * shape.patch_bytes(dtype) + ceil(finished),
        selection=features + peak_bytes(tokens, shape.width, tokens),
        held=held,
    )


def _side(size: int | Sequence[int]) -> int:
    """Of a square, of which some configs give both sides."""
    return size if isinstance(size, int) else size[0]

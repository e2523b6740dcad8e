"""Validate image embeddings from clients, because a wrong shape would kill the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.multimodal.media.image import ImageEmbeddingMediaIO
from vllm.multimodal.parse import MultiModalDataParser

from vllm_vtprune_server.validation import refused, shown

VALUES, GRID = "image_embeds", "image_grid_thw"
NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes that vLLM's reader accepts."""


class EmbeddingRules:
    """The valid form of image embeddings for one model.

    Args:
        model_config: vLLM's config of the model.
        parser: parser of its media; tells whether the model also needs the grid of patches.
    """

    def __init__(self, model_config: ModelConfig, parser: MultiModalDataParser) -> None:
        self._width = model_config.get_inputs_embeds_size()
        self._limit = model_config.max_model_len
        self._has_grid = GRID in parser.placeholder_metadata_fields("image")
        vision = getattr(model_config.hf_config, "vision_config", None)
        self._merge: int = getattr(vision, "spatial_merge_size", 1)

    def check(self, param: str, value: object) -> None:
        """Check the embeddings of one image. Decodes them, so do not call it in an event loop.

        Args:
            param: path of the field.
            value: (rows, width) floating-point numbers, saved by ``torch.save`` or ``numpy.save``, in base64. For
                models with grids of patches, an object with these as ``image_embeds`` and (3,) integers (time, height
                and width in patches) as ``image_grid_thw``.

        Raises:
            InvalidField: names the field, its value and what is accepted.
        """
        if not self._has_grid:
            self._rows(param, value)
            return
        if not isinstance(value, Mapping) or set(value) != {VALUES, GRID}:
            raise refused(param, "not the embeddings of an image", f"an object with {VALUES} and {GRID}")
        rows = self._rows(f"{param}.{VALUES}", value[VALUES])
        frames, height, width = self._grid(f"{param}.{GRID}", value[GRID])
        expected = frames * height * width // self._merge**2
        if rows != expected:
            raise refused(
                f"{param}.{VALUES}", f"{rows} rows", f"{expected}, for a grid of {frames} x {height} x {width}"
            )

    def _rows(self, param: str, value: object) -> int:
        accepted = f"from 1 to {self._limit} rows of {self._width} finite floating-point numbers"
        embeds = _tensor(param, value, accepted)
        if embeds.ndim == 3 and len(embeds) == 1 and not self._has_grid:
            embeds = embeds[0]
        shape = " x ".join(map(str, embeds.shape)) or "()"
        if embeds.ndim != 2 or embeds.shape[1] != self._width or not 0 < len(embeds) <= self._limit:
            raise refused(param, f"a tensor of shape {shape}", accepted)
        if embeds.dtype not in NUMBERS:
            raise refused(param, f"numbers of type {str(embeds.dtype).removeprefix('torch.')}", accepted)
        if not torch.isfinite(embeds.float()).all():
            raise refused(param, "not all numbers are finite", accepted)
        return len(embeds)

    def _grid(self, param: str, value: object) -> tuple[int, int, int]:
        accepted = f"three integers from 1: time, height and width, the last two divisible by {self._merge}"
        numbers: Any = value if isinstance(value, list) else _tensor(param, value, accepted).tolist()
        if (
            not isinstance(numbers, list)
            or len(numbers) != 3
            or any(type(number) is not int or number < 1 for number in numbers)
        ):
            raise refused(param, "not a grid", accepted)
        frames, height, width = numbers
        if height % self._merge or width % self._merge:
            raise refused(param, f"a grid of {frames} x {height} x {width}", accepted)
        return frames, height, width


def _tensor(param: str, value: object, accepted: str) -> torch.Tensor:
    """Decode a tensor as vLLM does, without running code in pickles."""
    if not isinstance(value, str):
        raise refused(param, f"{shown(value)} is not accepted", f"a string in base64: {accepted}")
    try:
        tensor = ImageEmbeddingMediaIO().load_base64("", value)
    except Exception:  # base64, pickle, numpy or torch
        raise refused(param, "cannot be decoded", f"a saved tensor in base64: {accepted}") from None
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise refused(param, "a tensor that is not plain", accepted)
    if tensor.requires_grad or tensor.is_neg() or tensor.is_conj():
        raise refused(param, "a tensor with a gradient or a pending operation", "it after .detach().clone()")
    return tensor

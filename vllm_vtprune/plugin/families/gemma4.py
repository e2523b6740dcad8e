"""Gemma 4 (``Gemma4ForConditionalGeneration``): images of any aspect ratio; a token is the mean of 3 x 3 patches.

The encoder is transformers' and pads every image to the patch count of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration, Gemma4MultiModalProcessor

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.family import Family, parameters_in_transformers
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor


def merge_size(config: Any) -> int:
    """Patches per token in either direction."""
    size: int = config.vision_config.pooling_kernel_size
    return size


def parameters(config: Any) -> int:
    """Parameter count of the image encoder and connector, without the audio encoder."""
    without_audio = copy(config)
    without_audio.audio_config = None
    return parameters_in_transformers(without_audio)


class PrunedGemma4Processor(PruningProcessor, Gemma4MultiModalProcessor):
    """Up to 280 tokens per image, or ``max_soft_tokens``."""

    turn = "<|turn>"
    family = Family(
        name="gemma4",
        clip_alpha=0.3,  # Qwen2.5-VL's; not calibrated
        provides=frozenset({"grid", "positions"}),
        connector="embed_vision.embedding_pre_projection_norm",
        merge=merge_size,
        pooled=True,
        options=frozenset({"max_soft_tokens"}),
        parameters=parameters,
    )

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        """The grid follows from the largest x and y of a patch; padding has -1."""
        merge = merge_size(self.info.get_hf_config())
        columns, rows = ((item["pixel_position_ids"].data.amax(dim=0) + 1) // merge).tolist()
        return Layout(rows * columns * merge**2, grid=(rows, columns))

    def max_image_tokens(self) -> int:
        count: int = self.info.get_mm_max_tokens_per_item(0, {})["image"]
        return count


@processed_by(PrunedGemma4Processor)
class PrunedGemma4ForConditionalGeneration(PrunedModel, Gemma4ForConditionalGeneration):
    """Gemma 4 with pruned images."""

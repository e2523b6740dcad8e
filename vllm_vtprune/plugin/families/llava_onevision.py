"""LLaVA-OneVision (``LlavaOnevisionForConditionalGeneration`` with a SigLIP encoder): LLaVA-NeXT on a larger canvas.

A canvas with many more tokens than 9 squares is resized to that number after the connector. A token is then a mean of
its neighbours on the larger canvas; so is its row of ``encoder``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
)
from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.families.clip import has_siglip, side
from vllm_vtprune.plugin.families.llava_next import anyres_of, squares_of
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor

MOST_SQUARES = 9
"""vLLM 0.32.0 uses "anyres_max_9" for any ``vision_aspect_ratio``."""


def most_patches(config: Any) -> int:
    """Most patches of an image: the overview and the squares of the largest canvas, before resizing."""
    squares = max(height * width for height, width in config.image_grid_pinpoints) // config.vision_config.image_size**2
    return int((1 + squares) * side(config) ** 2)


class PrunedLlavaOnevisionProcessor(PruningProcessor, LlavaOnevisionMultiModalProcessor):
    """729 tokens of the overview, and up to about nine times as many of the canvas plus a newline per row."""

    turn = "<|im_start|>"
    family = Family(
        name="llava_onevision",
        clip_alpha=0.3,  # Qwen2.5-VL's, which has a similar language model; not calibrated
        provides=frozenset({"positions"}),
        connector="multi_modal_projector",
        patches=most_patches,
    )

    @classmethod
    def prunes(cls, config: Any) -> bool:
        return has_siglip(config)

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        return anyres_of(self.info.get_hf_config(), item["image_sizes"].data, max_squares=MOST_SQUARES)

    def without_padding(self, item: MultiModalKwargsItem, layout: Layout) -> MultiModalKwargsItem:
        return squares_of(item, layout.patches // side(self.info.get_hf_config()) ** 2)

    def max_image_tokens(self) -> int:
        """An upper bound, with 1.21 times the canvas; vLLM's count covers one image size only."""
        config = self.info.get_hf_config()
        rows = max(height for height, _ in config.image_grid_pinpoints) // config.vision_config.patch_size
        return int((1 + 1.21 * MOST_SQUARES) * side(config) ** 2 + rows)


@processed_by(PrunedLlavaOnevisionProcessor)
class PrunedLlavaOnevisionForConditionalGeneration(PrunedModel, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with pruned images."""

"""LLaVA-OneVision (``LlavaOnevisionForConditionalGeneration`` with a SigLIP encoder): LLaVA-NeXT on a larger canvas.

Where the canvas has many more tokens than 9 squares, it is scaled down to as many after the connector: a token is then
a mean of its neighbours on the larger canvas, and so is what feeds the connector of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
)

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.families.clip import has_siglip, side
from vllm_vtprune.plugin.families.llava_next import anyres_of
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor

MOST_SQUARES = 9
"""vLLM 0.32.0 takes "anyres_max_9" for whatever ``vision_aspect_ratio`` a config names."""


def most_patches(config: Any) -> int:
    """Of an image: the overview, and the squares of the largest canvas, which are more than its tokens."""
    squares = max(height * width for height, width in config.image_grid_pinpoints) // config.vision_config.image_size**2
    return int((1 + squares) * side(config) ** 2)


class PrunedLlavaOnevisionProcessor(PruningProcessor, LlavaOnevisionMultiModalProcessor):
    """An overview of 729 tokens and a canvas of about nine times as many, with a newline after each row."""

    turn = "<|im_start|>"
    family = Family(
        name="llava_onevision",
        clip_alpha=0.3,  # that of Qwen2.5-VL, a model of its language model's kind; not calibrated
        provides=frozenset({"positions"}),
        connector="multi_modal_projector",
        fixed_length=False,
        patches=most_patches,
    )

    @classmethod
    def prunes(cls, config: Any) -> bool:
        return has_siglip(config)

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        return anyres_of(self.info.get_hf_config(), item["image_sizes"].data, most=MOST_SQUARES)

    def most_tokens(self) -> int:
        """With room for those that are not scaled down yet; vLLM's count is that of one size of image."""
        config = self.info.get_hf_config()
        seen = side(config) ** 2
        rows = max(height for height, _ in config.image_grid_pinpoints) // config.vision_config.patch_size
        return int((1 + 1.21 * MOST_SQUARES) * seen + rows)


@processed_by(PrunedLlavaOnevisionProcessor)
class PrunedLlavaOnevisionForConditionalGeneration(PrunedModel, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision, which also takes pruned images."""

"""Gemma 3 (``Gemma3ForConditionalGeneration``): SigLIP on a square image; a token is the mean of 4 x 4 patches."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from vllm.model_executor.models.gemma3_mm import Gemma3ForConditionalGeneration, Gemma3MultiModalProcessor

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.families.clip import side
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor

PANORAMA = (1_000_000, 1_000)
"""Width and height, in pixels, of an image that is cropped if cropping is on."""


def merge_size(config: Any) -> int:
    """Patches per token in either direction."""
    return side(config) // isqrt(config.mm_tokens_per_image)


class PrunedGemma3Processor(PruningProcessor, Gemma3MultiModalProcessor):
    """256 tokens per image, with two line feeds on either side, which the tokenizer merges with adjacent ones.

    "Pan and scan" (off by default) appends crops of the image, with text between them. An engine with it prunes
    nothing, and requests cannot set it.
    """

    turn = "<start_of_turn>"
    family = Family(
        name="gemma3",
        clip_alpha=0.3,  # Qwen2.5-VL's; not calibrated
        provides=frozenset({"grid", "positions"}),
        connector="multi_modal_projector.mm_soft_emb_norm",
        merge=merge_size,
        pooled=True,
    )

    @classmethod
    def prunes_engine(cls, info: Any) -> bool:
        """False if images are cropped."""
        width, height = PANORAMA
        crops = info.get_num_crops(
            image_width=width, image_height=height, processor=info.get_hf_processor(), mm_kwargs={}
        )
        return bool(crops == 0)

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        config = self.info.get_hf_config()
        length = side(config) // merge_size(config)
        return Layout(side(config) ** 2, grid=(length, length))

    def max_image_tokens(self) -> int:
        count: int = self.info.get_hf_config().mm_tokens_per_image
        return count


@processed_by(PrunedGemma3Processor)
class PrunedGemma3ForConditionalGeneration(PrunedModel, Gemma3ForConditionalGeneration):
    """Gemma 3 with pruned images."""

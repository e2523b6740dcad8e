"""Idefics3 and SmolVLM: SigLIP on tiles of the image, then on the whole image.

Pixel shuffle merges a block of patches into a token. In the prompt, text stands before each tile (its row and column)
and after each row of tiles; all of it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.idefics3 import Idefics3ForConditionalGeneration, Idefics3MultiModalProcessor
from vllm.model_executor.models.smolvlm import SmolVLMForConditionalGeneration
from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.families.internvl import tiled
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor


def merge_size(config: Any) -> int:
    """Patches per token in either direction."""
    scale: int = config.scale_factor
    return scale


class PrunedIdefics3Processor(PruningProcessor, Idefics3MultiModalProcessor):
    """Up to 16 tiles and the whole image, with equal token counts."""

    family = Family(
        name="idefics3",
        clip_alpha=0.3,  # Qwen2.5-VL's; not calibrated
        provides=frozenset({"positions"}),
        connector="model.connector.modality_projection",
        fixed_length=False,
        merge=merge_size,
        options=frozenset({"do_image_splitting", "max_image_size", "size"}),
    )

    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        config, processor = self.info.get_hf_config(), self.info.get_hf_processor(**hf_kwargs)
        options = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        _, rows, columns = processor.image_processor.get_number_of_image_patches(*size, options)
        placeholder = self.placeholder_of(item, size, hf_kwargs)
        assert placeholder is not None
        patches = config.vision_config.image_size // config.vision_config.patch_size
        return tiled(max(rows, 1), max(columns, 1), patches, merge_size(config), prompt=placeholder.ids)

    def max_image_tokens(self) -> int:
        side = self.info.get_hf_processor().image_processor.size["longest_edge"]
        count: int = self.info.get_num_image_tokens(
            image_width=side, image_height=side, processor=self.info.get_hf_processor(), mm_kwargs={}
        )
        return count


@processed_by(PrunedIdefics3Processor)
class PrunedIdefics3ForConditionalGeneration(PrunedModel, Idefics3ForConditionalGeneration):
    """Idefics3 and the first SmolVLM with pruned images."""


@processed_by(PrunedIdefics3Processor)
class PrunedSmolVLMForConditionalGeneration(PrunedModel, SmolVLMForConditionalGeneration):
    """SmolVLM2 with pruned images."""

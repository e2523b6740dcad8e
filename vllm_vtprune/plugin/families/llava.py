"""LLaVA-1.5 (``LlavaForConditionalGeneration``) with a CLIP or SigLIP encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor

from vllm_vtprune.features import Box, Layout
from vllm_vtprune.plugin.families.clip import ATTENTION, has_clip, has_siglip, side
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor

WITH_SIGLIP = Family(
    name="llava",
    clip_alpha=0.75,
    provides=frozenset({"grid", "positions"}),
    connector="multi_modal_projector",
)
WITH_CLIP = replace(WITH_SIGLIP, provides=WITH_SIGLIP.provides | {"cls_attention", "keys"}, attention=ATTENTION)


class PrunedLlavaProcessor(PruningProcessor, LlavaMultiModalProcessor):
    """One token per patch: 24 x 24 with CLIP at 336 pixels, 27 x 27 with SigLIP at 384."""

    @classmethod
    def prunes(cls, config: Any) -> bool:
        """False for models that drop SigLIP's first patch as if it were a CLS token."""
        return has_clip(config) or has_siglip(config)

    @classmethod
    def family_of(cls, config: Any) -> Family:
        return WITH_CLIP if has_clip(config) else WITH_SIGLIP

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        self.family = self.family_of(info.get_hf_config())
        super().__init__(info, dummy_inputs)

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        length = side(self.info.get_hf_config())
        return Layout(length**2, grid=(length, length))

    def view(self, height: int, width: int) -> Box:
        """With CLIP, the centre square: the image processor resizes the shorter side and crops the longer one."""
        config = self.info.get_hf_config()
        if not has_clip(config):  # patches leave a margin at the right and the bottom
            share = side(config) * config.vision_config.patch_size / config.vision_config.image_size
            return 0.0, 0.0, share, share
        top, left = max(0.0, 1 - width / height) / 2, max(0.0, 1 - height / width) / 2
        return top, left, 1 - top, 1 - left


@processed_by(PrunedLlavaProcessor)
class PrunedLlavaForConditionalGeneration(PrunedModel, LlavaForConditionalGeneration):
    """LLaVA-1.5 with pruned images."""

"""Qwen2.5-VL (``Qwen2_5_VLForConditionalGeneration``): images at native resolution, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers.vision_utils import get_vision_window_index
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLMultiModalProcessor

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.families.qwen import OPTIONS, PROVIDES, QwenProcessor, merge_size
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.positions import UnprunedPositions


class PrunedQwen2_5_VLProcessor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """One token per 28 x 28 pixels."""

    family = Family(
        name="qwen2_5_vl",
        clip_alpha=0.3,
        provides=PROVIDES,
        drops_duplicates=True,
        connector="visual.merger.ln_q",
        merge=merge_size,
        options=OPTIONS,
    )

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        """The merger's input is ordered by attention window, the four patches of a token adjacent."""
        vision = self.info.get_hf_config().vision_config
        grid = item["image_grid_thw"].data[None]
        order, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return replace(super().layout(item, size, hf_kwargs), connector_rows=order.argsort())


@processed_by(PrunedQwen2_5_VLProcessor)
class PrunedQwen2_5_VLForConditionalGeneration(UnprunedPositions, PrunedModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with pruned images."""

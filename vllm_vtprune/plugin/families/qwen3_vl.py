"""Qwen3-VL (``Qwen3VLForConditionalGeneration``, with experts ``Qwen3VLMoeForConditionalGeneration``).

Like Qwen2.5-VL, without windows, and with additional embeddings for deeper layers of the language model (DeepStack).
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLMultiModalProcessor
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from vllm_vtprune.plugin.families.qwen import OPTIONS, PROVIDES, QwenProcessor, merge_size
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.positions import UnprunedPositions


def planes(config: Any) -> int:
    """Number of encoder layers whose features enter deeper layers of the language model."""
    return len(config.vision_config.deepstack_visual_indexes)


class PrunedQwen3VLProcessor(QwenProcessor, Qwen3VLMultiModalProcessor):
    """One token per 32 x 32 pixels."""

    family = Family(
        name="qwen3_vl",
        clip_alpha=0.3,  # Qwen2.5-VL's; not calibrated
        provides=PROVIDES,
        drops_duplicates=True,
        connector="visual.merger.norm",
        merge=merge_size,
        deepstack=planes,
        options=OPTIONS,
    )


@processed_by(PrunedQwen3VLProcessor)
class PrunedQwen3VLForConditionalGeneration(UnprunedPositions, PrunedModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with pruned images; kept embeddings include the DeepStack planes."""


@processed_by(PrunedQwen3VLProcessor)
class PrunedQwen3VLMoeForConditionalGeneration(UnprunedPositions, PrunedModel, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL with experts and pruned images."""

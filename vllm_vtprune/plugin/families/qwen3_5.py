"""Qwen3.5 (``Qwen3_5ForConditionalGeneration``, with experts ``Qwen3_5MoeForConditionalGeneration``).

Qwen3-VL's encoder without DeepStack. Most layers of the language model are linear attention, which sees the order of
the kept tokens but no positions.
"""

from __future__ import annotations

from dataclasses import replace

from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

from vllm_vtprune.plugin.families.qwen3_vl import PrunedQwen3VLProcessor
from vllm_vtprune.plugin.family import zero
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.positions import UnprunedPositions


class PrunedQwen3_5Processor(PrunedQwen3VLProcessor):
    """One token per 32 x 32 pixels."""

    family = replace(PrunedQwen3VLProcessor.family, name="qwen3_5", deepstack=zero)


@processed_by(PrunedQwen3_5Processor)
class PrunedQwen3_5ForConditionalGeneration(UnprunedPositions, PrunedModel, Qwen3_5ForConditionalGeneration):
    """Qwen3.5 with pruned images."""


@processed_by(PrunedQwen3_5Processor)
class PrunedQwen3_5MoeForConditionalGeneration(UnprunedPositions, PrunedModel, Qwen3_5MoeForConditionalGeneration):
    """Qwen3.5 with experts and pruned images."""

"""Qwen3.5 (``Qwen3_5ForConditionalGeneration``, with experts ``Qwen3_5MoeForConditionalGeneration``).

Qwen3-VL's encoder without DeepStack, before a language model most of whose layers are linear attention: those see the
order of the tokens that are kept and no positions.
"""

from __future__ import annotations

from dataclasses import replace

from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration

from vllm_vtprune.plugin.families.qwen3_vl import PrunedQwen3VLProcessor
from vllm_vtprune.plugin.family import none
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.positions import KeepsPositions


class PrunedQwen3_5Processor(PrunedQwen3VLProcessor):
    """One image has a token for each 32 x 32 pixels."""

    family = replace(PrunedQwen3VLProcessor.family, name="qwen3_5", deepstack=none)


@processed_by(PrunedQwen3_5Processor)
class PrunedQwen3_5ForConditionalGeneration(KeepsPositions, PrunedModel, Qwen3_5ForConditionalGeneration):
    """Qwen3.5, which also takes pruned images."""


@processed_by(PrunedQwen3_5Processor)
class PrunedQwen3_5MoeForConditionalGeneration(KeepsPositions, PrunedModel, Qwen3_5MoeForConditionalGeneration):
    """The same with experts."""

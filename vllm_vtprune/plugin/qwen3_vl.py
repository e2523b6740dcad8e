"""Qwen3-VL (``Qwen3VLForConditionalGeneration``): as Qwen2.5-VL, with more planes of embeddings for deeper layers."""

from __future__ import annotations

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.items import TakesKeptEmbeddings
from vllm_vtprune.plugin.positions import KeepsPositions
from vllm_vtprune.plugin.qwen import QwenProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import QWEN3_VL
from vllm_vtprune.towers.base import VisionTower

ARCHITECTURE = "Qwen3VLForConditionalGeneration"


class PrunedQwen3VLProcessor(QwenProcessor, Qwen3VLMultiModalProcessor):
    """One image has a token for each 32 x 32 pixels."""

    architecture = ARCHITECTURE
    family = QWEN3_VL

    def build_tower(self, model_config: ModelConfig, device: torch.device) -> VisionTower:
        from vllm_vtprune.plugin.vision import Qwen3VLEncoder  # builds vLLM's model, which engines need not import

        return Qwen3VLEncoder.of(model_config, device)


_stock = compat.stock_factories(Qwen3VLForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(PrunedQwen3VLProcessor, info=_stock.info, dummy_inputs=_stock.dummy_inputs)
class PrunedQwen3VLForConditionalGeneration(
    KeepsPositions, TakesKeptEmbeddings, NotesLoads, Qwen3VLForConditionalGeneration
):
    """The stock model, which also accepts images that arrive as the embeddings of the tokens to keep, all planes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

"""Qwen2.5-VL (``Qwen2_5_VLForConditionalGeneration``): images at their own resolution, positions of three numbers."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.items import TakesKeptEmbeddings
from vllm_vtprune.plugin.positions import KeepsPositions
from vllm_vtprune.plugin.qwen import QwenProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import QWEN2_5_VL

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"


class PrunedQwen2_5_VLProcessor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """One image has a token for each 28 x 28 pixels."""

    architecture = ARCHITECTURE
    family = QWEN2_5_VL


_stock = compat.stock_factories(Qwen2_5_VLForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(PrunedQwen2_5_VLProcessor, info=_stock.info, dummy_inputs=_stock.dummy_inputs)
class PrunedQwen2_5_VLForConditionalGeneration(
    KeepsPositions, TakesKeptEmbeddings, NotesLoads, Qwen2_5_VLForConditionalGeneration
):
    """The stock model, which also accepts images that arrive as the embeddings of the tokens to keep."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

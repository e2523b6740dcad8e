"""LLaVA-1.5 (``LlavaForConditionalGeneration`` with a CLIP encoder)."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.features import Box
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.clip import has_tower, processor_factory
from vllm_vtprune.plugin.items import TakesKeptEmbeddings
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import LLAVA

ARCHITECTURE = "LlavaForConditionalGeneration"


class PrunedLlavaProcessor(PruningProcessor, LlavaMultiModalProcessor):
    """One image is 576 tokens (24 x 24 at 336 pixels) unpruned."""

    architecture = ARCHITECTURE
    family = LLAVA

    def view(self, height: int, width: int) -> Box:
        """The square in the middle: the image processor makes the shorter side fit and crops the longer one."""
        top, left = max(0.0, 1 - width / height) / 2, max(0.0, 1 - height / width) / 2
        return top, left, 1 - top, 1 - left


_stock = compat.stock_factories(LlavaForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(
    processor_factory(PrunedLlavaProcessor, _stock.processor), info=_stock.info, dummy_inputs=_stock.dummy_inputs
)
class PrunedLlavaForConditionalGeneration(TakesKeptEmbeddings, NotesLoads, LlavaForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings of the tokens to keep."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if has_tower(vllm_config.model_config.hf_config):
            compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

"""LLaVA-NeXT (``LlavaNextForConditionalGeneration`` with a CLIP encoder)."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration, LlavaNextMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.clip import has_tower, processor_factory
from vllm_vtprune.plugin.items import TakesKeptEmbeddings
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import LLAVA_NEXT

ARCHITECTURE = "LlavaNextForConditionalGeneration"


class PrunedLlavaNextProcessor(PruningProcessor, LlavaNextMultiModalProcessor):
    """One image is an overview of 576 tokens and up to 2,304 of the squares, a newline after each of their rows."""

    architecture = ARCHITECTURE
    family = LLAVA_NEXT


_stock = compat.stock_factories(LlavaNextForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(
    processor_factory(PrunedLlavaNextProcessor, _stock.processor),
    info=_stock.info,
    dummy_inputs=_stock.dummy_inputs,
)
class PrunedLlavaNextForConditionalGeneration(TakesKeptEmbeddings, NotesLoads, LlavaNextForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings to prefill."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if has_tower(vllm_config.model_config.hf_config):
            compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

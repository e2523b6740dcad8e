"""vLLM models without their own family: only an image's embeddings are known.

A model is pruned if its prompts have one placeholder token per embedding and its positions are 0, 1, 2, ... Text
between an image's tokens is kept. `__getattr__` returns the class for an architecture: vLLM's own if it cannot be
pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from vllm.model_executor.models.interfaces import supports_mrope, supports_multimodal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.image import size_of
from vllm_vtprune.plugin.model import PrunedModel
from vllm_vtprune.plugin.placeholders import Placeholder
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.unpruned import unpruned

SIZES = ((64, 64), (600, 64), (64, 600), (900, 900))
"""Widths and heights, in pixels, of images that must have the same placeholder token."""

PATCHES = 4
"""Assumed patches per token, for limiting the encoder's batches."""


class GenericProcessor(PruningProcessor):
    """Mixin before any stock processor. ``encoder`` equals ``embeds``; no grid, no attention."""

    family = Family(name="generic", clip_alpha=0.5, provides=frozenset(), connector="", tuned=False, fixed_length=False)

    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        placeholder = self.placeholder_of(item, size, hf_kwargs)
        assert placeholder is not None
        return Layout(PATCHES * placeholder.num_embeds, prompt=placeholder.ids)

    def has_single_placeholder(self) -> bool:
        """Whether images of all `SIZES` have one placeholder token per embedding, always the same token."""
        placeholders = [self._placeholder_for(Image.new("RGB", size)) for size in SIZES]
        return None not in placeholders and len({placeholder.token for placeholder in placeholders if placeholder}) == 1

    def max_image_tokens(self) -> int:
        """Tokens of the image with which vLLM profiles the encoder."""
        data = self.dummy_inputs.get_dummy_mm_data(self.model_config.max_model_len, {"image": 1}, {})
        placeholder = self._placeholder_for(data["image"][0])
        assert placeholder is not None
        return placeholder.num_embeds

    def _placeholder_for(self, image: Image.Image) -> Placeholder | None:
        return self.placeholder_of(self.stock_item(image), size_of(image), {})


def build(info: Any, dummy_inputs: Any, stock: Any) -> Any:
    """Build a model's processor: a pruning one if possible.

    Args:
        info, dummy_inputs: from vLLM.
        stock: the model's stock factories.
    """
    config = info.ctx.model_config
    if "image" in info.supported_mm_limits and not config.is_mm_prefix_lm and not config.is_encoder_decoder:
        stock_class = type(stock.processor(info, dummy_inputs))
        processor = type(f"Pruned{stock_class.__name__}", (GenericProcessor, stock_class), {})(info, dummy_inputs)
        if processor.has_single_placeholder():
            return processor
    return unpruned(stock.processor, info, dummy_inputs)


def _has_plain_positions(stock: Any) -> bool:
    """Whether a model accepts images and has no M-RoPE."""
    if not supports_multimodal(stock) or supports_mrope(stock) or not compat.has_stock_factories(stock):
        return False
    try:
        return bool(stock.get_placeholder_str("image", 1))
    except Exception:  # audio models raise various errors for images
        return False


def __getattr__(architecture: str) -> type:
    stock = compat.stock_model(architecture)
    if stock is None:
        raise AttributeError(architecture)
    if not _has_plain_positions(stock):
        return stock
    factories = compat.stock_factories(stock)
    namespace = {"_pruning": GenericProcessor, "_takes_embeds": False, "__module__": __name__}
    model: Any = type(f"Pruned{architecture}", (PrunedModel, stock), namespace)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        return build(info, dummy_inputs, factories)

    registered: type = MULTIMODAL_REGISTRY.register_processor(
        processor, info=factories.info, dummy_inputs=factories.dummy_inputs
    )(model)
    globals()[architecture] = registered
    return registered

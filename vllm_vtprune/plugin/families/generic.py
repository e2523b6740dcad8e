"""Models of vLLM that have no family of their own: what is known of an image is the embeddings that it becomes.

Those are pruned in whose prompts one token stands for each embedding, and whose positions are numbered one by one. Text
between the tokens of an image stays. `__getattr__` gives the class that serves an architecture: vLLM's own, where it
cannot be pruned.
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
"""Widths and heights, in pixels, of images for which the same token is to stand."""

PATCHES = 4
"""Of a token: a guess, by which batches of the encoder are bounded."""


class GenericProcessor(PruningProcessor):
    """Mixin before any stock processor. ``encoder`` is ``embeds``; there is neither a grid nor attention."""

    family = Family(name="generic", clip_alpha=0.5, provides=frozenset(), connector="", tuned=False, fixed_length=False)

    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        placeholder = self.placeholder_of(item, size, hf_kwargs)
        assert placeholder is not None
        return Layout(PATCHES * placeholder.num_embeds, prompt=placeholder.ids)

    def understands(self) -> bool:
        """Whether one token stands for each embedding of an image, the same for images of each of `SIZES`."""
        placeholders = [self._placeholder_for(Image.new("RGB", size)) for size in SIZES]
        return None not in placeholders and len({placeholder.token for placeholder in placeholders if placeholder}) == 1

    def most_tokens(self) -> int:
        """Of the image that vLLM measures its encoder with."""
        data = self.dummy_inputs.get_dummy_mm_data(self.model_config.max_model_len, {"image": 1}, {})
        placeholder = self._placeholder_for(data["image"][0])
        assert placeholder is not None
        return placeholder.num_embeds

    def _placeholder_for(self, image: Image.Image) -> Placeholder | None:
        return self.placeholder_of(self.stock_item(image), size_of(image), {})


def build(info: Any, dummy_inputs: Any, stock: Any) -> Any:
    """The processor of a model.

    Args:
        info, dummy_inputs: as vLLM gives them.
        stock: the factories of the model.
    """
    config = info.ctx.model_config
    if "image" in info.supported_mm_limits and not config.is_mm_prefix_lm and not config.is_encoder_decoder:
        own = type(stock.processor(info, dummy_inputs))
        processor = type(f"Pruned{own.__name__}", (GenericProcessor, own), {})(info, dummy_inputs)
        if processor.understands():
            return processor
    return unpruned(stock.processor, info, dummy_inputs)


def _sees_numbered_images(stock: Any) -> bool:
    """Whether a model takes images, and numbers the tokens of a prompt one by one."""
    if not supports_multimodal(stock) or supports_mrope(stock) or not compat.has_stock_factories(stock):
        return False
    try:
        return bool(stock.get_placeholder_str("image", 1))
    except Exception:  # models of sounds have no word for an image, and each says so in its own way
        return False


def __getattr__(architecture: str) -> type:
    stock = compat.stock_model(architecture)
    if stock is None:
        raise AttributeError(architecture)
    if not _sees_numbered_images(stock):
        return stock
    factories = compat.stock_factories(stock)
    own = {"_pruning": GenericProcessor, "_takes_embeds": False, "__module__": __name__}
    model: Any = type(f"Pruned{architecture}", (PrunedModel, stock), own)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        return build(info, dummy_inputs, factories)

    registered: type = MULTIMODAL_REGISTRY.register_processor(
        processor, info=factories.info, dummy_inputs=factories.dummy_inputs
    )(model)
    globals()[architecture] = registered
    return registered

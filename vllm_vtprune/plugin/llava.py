"""LLaVA-1.5 (``LlavaForConditionalGeneration`` with a CLIP encoder)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.features import Box, PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.clip import ClipProcessor, has_tower, processor_factory
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import LLAVA

ARCHITECTURE = "LlavaForConditionalGeneration"


class PrunedLlavaProcessor(ClipProcessor, LlavaMultiModalProcessor):
    """One image is 576 tokens (24 x 24 at 336 pixels) unpruned; its one field holds pixels or kept embeddings."""

    architecture = ARCHITECTURE
    family = LLAVA

    def view(self, height: int, width: int) -> Box:
        """The square in the middle: the image processor makes the shorter side fit and crops the longer one."""
        top, left = max(0.0, 1 - width / height) / 2, max(0.0, 1 - height / width) / 2
        return top, left, 1 - top, 1 - left

    def pruned_item(self, embeds: torch.Tensor, features: VisualFeatures, plan: PruningPlan) -> PreparedImage:
        return {"pixel_values": embeds}


_stock = compat.stock_factories(LlavaForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(
    processor_factory(PrunedLlavaProcessor, _stock.processor), info=_stock.info, dummy_inputs=_stock.dummy_inputs
)
class PrunedLlavaForConditionalGeneration(NotesLoads, LlavaForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings of the tokens to keep."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if has_tower(vllm_config.model_config.hf_config):
            compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Embeddings of a batch of images, in order.

        Args:
            pixel_values: (B, 3, H, W), or a list whose entries are (3, H, W) pixels or (k, d) embeddings; equal
                embeddings may come stacked as (B, k, d).

        Returns:
            As the stock model for pixels alone; else one (tokens, d) tensor for each image.
        """
        given: Any = kwargs.get("image_embeds")
        if given is not None:  # by clients, of as many rows each as they like
            return list(given)
        images = kwargs.get("pixel_values")
        if images is None or (isinstance(images, torch.Tensor) and images.ndim == 4):
            return super().embed_multimodal(**kwargs)
        in_pixels = [image for image in images if image.ndim == 3]  # type: ignore[attr-defined]
        encoded = iter(super().embed_multimodal(pixel_values=torch.stack(in_pixels)) if in_pixels else ())
        return [next(encoded) if image.ndim == 3 else image for image in images]  # type: ignore[attr-defined]

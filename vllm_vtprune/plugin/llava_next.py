"""LLaVA-NeXT (``LlavaNextForConditionalGeneration`` with a CLIP encoder)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration, LlavaNextMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.clip import ClipProcessor, has_tower, processor_factory
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import LLAVA_NEXT

ARCHITECTURE = "LlavaNextForConditionalGeneration"


class PrunedLlavaNextProcessor(ClipProcessor, LlavaNextMultiModalProcessor):
    """One image is an overview of 576 tokens and up to 2,304 of the squares, with a newline after each of their rows.

    ``pixel_values`` of an item holds the squares or the embeddings to prefill. ``image_sizes`` of a pruned one is zero:
    only the stock code for pixels reads it.
    """

    architecture = ARCHITECTURE
    family = LLAVA_NEXT

    def pruned_item(self, embeds: torch.Tensor, features: VisualFeatures, plan: PruningPlan) -> PreparedImage:
        return {"pixel_values": embeds, "image_sizes": torch.zeros(2, dtype=torch.long)}


_stock = compat.stock_factories(LlavaNextForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(
    processor_factory(PrunedLlavaNextProcessor, _stock.processor),
    info=_stock.info,
    dummy_inputs=_stock.dummy_inputs,
)
class PrunedLlavaNextForConditionalGeneration(NotesLoads, LlavaNextForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings to prefill."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if has_tower(vllm_config.model_config.hf_config):
            compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Embeddings of a batch of images, in order.

        Args:
            pixel_values: (B, squares, 3, H, W), or a list whose entries are (squares, 3, H, W) pixels or (T, d)
                embeddings; equal embeddings may come stacked as (B, T, d).
            image_sizes: (B, 2), height and width in pixels; only read for images in pixels.

        Returns:
            As the stock model for pixels alone; else one (tokens, d) tensor for each image.
        """
        given: Any = kwargs.get("image_embeds")
        if given is not None:  # by clients, of as many rows each as they like
            return list(given)
        images: Any = kwargs.get("pixel_values")
        in_pixels = [] if images is None else [i for i, image in enumerate(images) if image.ndim == 4]
        if images is None or len(in_pixels) == len(images):
            return super().embed_multimodal(**kwargs)
        embeddings = list(images)
        if in_pixels:
            sizes: Any = kwargs["image_sizes"]
            encoded = super().embed_multimodal(
                pixel_values=[images[i] for i in in_pixels], image_sizes=torch.stack([sizes[i] for i in in_pixels])
            )
            for i, its in zip(in_pixels, encoded, strict=True):
                embeddings[i] = its
        return embeddings

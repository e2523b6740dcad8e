"""InternVL in the layout of transformers (``InternVLForConditionalGeneration``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from vllm.config import VllmConfig
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration, InternS1MultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import INTERNVL

ARCHITECTURE = "InternVLForConditionalGeneration"

KEPT = "kept_embeds"
"""Field of our items: (k, d), the embeddings to prefill; of no rows for an image in pixels."""

KEPT_SIZES = "kept_sizes"
"""Field of our items: k, 0 for an image in pixels."""


class PrunedInternVLProcessor(PruningProcessor, InternS1MultiModalProcessor):
    """One image is 256 tokens for each of its tiles, between ``<img>`` and ``</img>``.

    Where a prompt has a pruned image, all its images have two more fields, `KEPT` and `KEPT_SIZES`. A pruned one has no
    tiles.
    """

    architecture = ARCHITECTURE
    family = INTERNVL

    @property
    def image_token_id(self) -> int:
        token_id: int = self.info.get_hf_config().image_token_id
        return token_id

    def pruned_item(self, embeds: torch.Tensor, features: VisualFeatures, plan: PruningPlan) -> PreparedImage:
        config = self.info.get_hf_config()
        return {
            "pixel_values": torch.empty(0, 3, *config.vision_config.image_size, dtype=embeds.dtype),
            "image_num_patches": torch.tensor(0),
            "image_token_id": torch.tensor(config.image_token_id),
            KEPT: embeds,
            KEPT_SIZES: torch.tensor(len(embeds)),
        }

    def kept_count(self, item: PreparedImage) -> int | None:
        return int(item[KEPT_SIZES]) or None if KEPT_SIZES in item else None

    def collate(self, items: Sequence[PreparedImage]) -> Mapping[str, Any]:
        some = next(item[KEPT] for item in items if KEPT in item)
        kept = [item.get(KEPT, some[:0]) for item in items]
        return {
            "pixel_values": torch.cat([item["pixel_values"] for item in items]),
            "image_num_patches": torch.stack([item["image_num_patches"] for item in items]),
            "image_token_id": items[0]["image_token_id"],
            KEPT: torch.cat(kept),
            KEPT_SIZES: torch.tensor([len(embeds) for embeds in kept]),
        }

    def placeholder(self, num_tokens: int) -> Any:
        processor = self.info.get_hf_processor()
        tokens = [processor.start_image_token_id, *[self.image_token_id] * num_tokens, processor.end_image_token_id]
        return PromptUpdateDetails.select_token_id(tokens, self.image_token_id)

    def for_tower(self, item: PreparedImage, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> PreparedImage:
        """With the rows and columns of tiles, which the number of tiles does not tell."""
        rows, columns = 1, 1
        if len(item["pixel_values"]) > 1:
            processor = self.info.get_hf_processor(**hf_kwargs).image_processor
            given = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
            given |= given.get("images_kwargs", {})
            columns, rows = get_optimal_tiled_canvas(
                size,
                (processor.size.height, processor.size.width),
                given.get("min_patches", processor.min_patches),
                given.get("max_patches", processor.max_patches),
            )
        return {"pixel_values": item["pixel_values"], "tile_grid": torch.tensor([rows, columns])}

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        if KEPT not in hf_inputs:
            return fields
        return {
            **fields,
            KEPT: MultiModalFieldConfig.flat_from_sizes("image", hf_inputs[KEPT_SIZES]),
            KEPT_SIZES: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }


_stock = compat.stock_factories(InternS1ForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(PrunedInternVLProcessor, info=_stock.info, dummy_inputs=_stock.dummy_inputs)
class PrunedInternVLForConditionalGeneration(NotesLoads, InternS1ForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings to prefill."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings of a batch of images or videos, in order.

        Args:
            kwargs: as for the stock model, with `KEPT` (of all images, one after the other) and `KEPT_SIZES` (B,) where
                any of their prompts has a pruned image.

        Returns:
            As the stock model; (k, d) for a pruned image.
        """
        if kwargs.get("image_embeds") is not None:  # by clients, of as many rows each as they like
            return list(kwargs["image_embeds"])
        kept, sizes = kwargs.pop(KEPT, None), kwargs.pop(KEPT_SIZES, None)
        if sizes is None or not sizes.any():
            return super().embed_multimodal(**kwargs)
        in_pixels = sizes == 0
        encoded = iter(())
        if in_pixels.any():
            kwargs["image_num_patches"] = kwargs["image_num_patches"][in_pixels]
            encoded = iter(super().embed_multimodal(**kwargs))
        pruned = iter(kept.split(sizes[~in_pixels].tolist()))
        return tuple(next(encoded) if pixels else next(pruned) for pixels in in_pixels.tolist())

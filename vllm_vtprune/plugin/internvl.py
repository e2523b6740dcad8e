"""InternVL in the layout of transformers (``InternVLForConditionalGeneration``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from vllm.config import VllmConfig
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration, InternS1MultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails

from vllm_vtprune.features import PreparedImage
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.items import TakesKeptEmbeddings
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import INTERNVL

ARCHITECTURE = "InternVLForConditionalGeneration"


class PrunedInternVLProcessor(PruningProcessor, InternS1MultiModalProcessor):
    """One image is 256 tokens for each of its tiles, between ``<img>`` and ``</img>``."""

    architecture = ARCHITECTURE
    family = INTERNVL

    @property
    def image_token_id(self) -> int:
        token_id: int = self.info.get_hf_config().image_token_id
        return token_id

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


_stock = compat.stock_factories(InternS1ForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(PrunedInternVLProcessor, info=_stock.info, dummy_inputs=_stock.dummy_inputs)
class PrunedInternVLForConditionalGeneration(TakesKeptEmbeddings, NotesLoads, InternS1ForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings to prefill."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

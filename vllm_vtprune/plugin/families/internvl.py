"""InternVL in the layout of transformers (``InternVLForConditionalGeneration``): InternViT on tiles of the image.

The image is resized to a grid of tiles, which are encoded separately. If there are several, a thumbnail of the whole
image follows. Pixel shuffle concatenates 2 x 2 patches, and the connector maps them to a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration, InternS1MultiModalProcessor

from vllm_vtprune.features import Box, Layout, Tiles
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.limits import VIDEO_OPTIONS
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor

LAYERS = "vision_tower.encoder.layer"


def merge_size(config: Any) -> int:
    """Patches per token in either direction."""
    return round(1 / config.downsample_ratio)


class PrunedInternVLProcessor(PruningProcessor, InternS1MultiModalProcessor):
    """256 tokens per tile, between ``<img>`` and ``</img>``."""

    family = Family(
        name="internvl",
        clip_alpha=0.3,  # Qwen2.5-VL's, whose language model InternVL3 shares; not calibrated
        provides=frozenset({"cls_attention", "overview_attention", "keys", "positions"}),
        connector="multi_modal_projector",
        attention=(f"{LAYERS}.0.attention.attn", f"{LAYERS}.-1.attention.attn"),
        merge=merge_size,
        options=VIDEO_OPTIONS | {"crop_to_patches", "max_patches", "min_patches"},
    )

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        config = self.info.get_hf_config()
        patches = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
        rows, columns = 1, 1
        if len(item["pixel_values"].data) > 1:
            processor = self.info.get_hf_processor(**hf_kwargs).image_processor
            options = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
            options |= options.get("images_kwargs", {})
            columns, rows = get_optimal_tiled_canvas(
                size,
                (processor.size.height, processor.size.width),
                options.get("min_patches", processor.min_patches),
                options.get("max_patches", processor.max_patches),
            )
        return tiled(rows, columns, patches, merge_size(config))


def tiled(
    rows: int,
    columns: int,
    patches: int,
    merge: int,
    *,
    thumbnail: bool = True,
    prompt: tuple[int, ...] | None = None,
) -> Layout:
    """The layout of an image cut into tiles.

    Args:
        rows, columns: rows and columns of tiles.
        patches: patches per side of a tile.
        merge: patches per token in either direction.
        thumbnail: whether a thumbnail follows several tiles.
        prompt: see `Layout`.
    """
    side = patches // merge
    if rows * columns == 1:
        return Layout(patches**2, grid=(side, side), prompt=prompt)
    boxes: list[Box | None] = [
        (row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
        for row in range(rows)
        for column in range(columns)
    ]
    if thumbnail:
        boxes.append(None)
    count = len(boxes)
    tiles = Tiles(torch.arange(count).repeat_interleave(side**2), ((side, side),) * count, tuple(boxes))
    return Layout(count * patches**2, tiles=tiles, prompt=prompt)


@processed_by(PrunedInternVLProcessor)
class PrunedInternVLForConditionalGeneration(PrunedModel, InternS1ForConditionalGeneration):
    """InternVL with pruned images."""

"""InternVL in the layout of transformers (``InternVLForConditionalGeneration``): InternViT on tiles of the image.

The image is scaled to a number of tiles, each of which is encoded by itself; where it is more than one, a thumbnail of
the whole image follows. Pixel shuffle puts blocks of 2 x 2 patches side by side, and the connector makes one token of
each block.
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


def across(config: Any) -> int:
    """Patches of a token in either direction."""
    return round(1 / config.downsample_ratio)


class PrunedInternVLProcessor(PruningProcessor, InternS1MultiModalProcessor):
    """One image is 256 tokens for each of its tiles, between ``<img>`` and ``</img>``."""

    family = Family(
        name="internvl",
        clip_alpha=0.3,  # that of Qwen2.5-VL, whose language model InternVL3 has; not calibrated
        provides=frozenset({"cls_attention", "overview_attention", "keys", "positions"}),
        connector="multi_modal_projector",
        attention=(f"{LAYERS}.0.attention.attn", f"{LAYERS}.-1.attention.attn"),
        merge=across,
        options=VIDEO_OPTIONS | {"crop_to_patches", "max_patches", "min_patches"},
    )

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        config = self.info.get_hf_config()
        patches = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
        rows, columns = 1, 1
        if len(item["pixel_values"].data) > 1:
            processor = self.info.get_hf_processor(**hf_kwargs).image_processor
            given = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
            given |= given.get("images_kwargs", {})
            columns, rows = get_optimal_tiled_canvas(
                size,
                (processor.size.height, processor.size.width),
                given.get("min_patches", processor.min_patches),
                given.get("max_patches", processor.max_patches),
            )
        return tiled(rows, columns, patches, across(config))


def tiled(
    rows: int,
    columns: int,
    patches: int,
    across: int,
    *,
    thumbnail: bool = True,
    prompt: tuple[int, ...] | None = None,
) -> Layout:
    """The layout of an image of so many rows and columns of tiles, and the thumbnail where it has several.

    Args:
        rows, columns: of tiles.
        patches: of a tile's side.
        across: patches of a token in either direction.
        thumbnail: whether several have one.
        prompt: as of `Layout`.
    """
    side = patches // across
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
    """InternVL, which also takes pruned images."""

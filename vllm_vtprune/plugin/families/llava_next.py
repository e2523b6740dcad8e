"""LLaVA-NeXT (``LlavaNextForConditionalGeneration`` with a CLIP encoder): an overview and square tiles ("anyres").

The image is resized to the best of several sizes, padded and cut into squares. The squares and the overview (the whole
image resized to one square) are encoded separately. The language model reads the overview's tokens in raster order,
then the canvas: the tokens of all squares in one raster, without rows or columns of padding, with a newline after each
row, which stays (`vllm_vtprune.sequence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import sqrt
from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration, LlavaNextMultiModalProcessor
from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_vtprune.features import Box, Layout, Tiles
from vllm_vtprune.plugin.families.clip import ATTENTION, has_clip, side
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor


class PrunedLlavaNextProcessor(PruningProcessor, LlavaNextMultiModalProcessor):
    """576 tokens of the overview, and up to 2,304 of the canvas plus a newline per row."""

    family = Family(
        name="llava_next",
        clip_alpha=0.75,
        provides=frozenset({"cls_attention", "overview_attention", "keys", "positions"}),
        connector="multi_modal_projector",
        attention=ATTENTION,
    )

    @classmethod
    def prunes(cls, config: Any) -> bool:
        return has_clip(config)

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        return anyres_of(self.info.get_hf_config(), item["image_sizes"].data)

    def without_padding(self, item: MultiModalKwargsItem, layout: Layout) -> MultiModalKwargsItem:
        return squares_of(item, layout.patches // side(self.info.get_hf_config()) ** 2)


def squares_of(item: MultiModalKwargsItem, count: int) -> MultiModalKwargsItem:
    """An image's item with its first ``count`` squares; the image processor adds empty squares beside larger images."""
    pixels = item["pixel_values"]
    return MultiModalKwargsItem({**item, "pixel_values": replace(pixels, data=pixels.data[:count])})


def anyres_of(config: Any, size: torch.Tensor, *, max_squares: int | None = None) -> Layout:
    """`anyres` for a model with this config."""
    height, width = size.tolist()
    return anyres(
        (height, width),
        pinpoints=tuple((int(rows), int(columns)) for rows, columns in config.image_grid_pinpoints),
        image_size=config.vision_config.image_size,
        side=side(config),
        max_squares=max_squares,
    )


@lru_cache(maxsize=64)
def anyres(
    size: tuple[int, int],
    *,
    pinpoints: tuple[tuple[int, int], ...],
    image_size: int,
    side: int,
    max_squares: int | None = None,
) -> Layout:
    """The layout of an image under "anyres".

    Args:
        size: height and width in pixels.
        pinpoints: heights and widths, in pixels, to which an image may be resized.
        image_size: pixels per side of a square.
        side: tokens per side of a square.
        max_squares: a canvas with over 1.21 times the tokens of this many squares is resized to them; None: never.
    """
    down, across = get_anyres_image_grid_shape(size, [list(point) for point in pinpoints], image_size)
    raster = torch.arange(down * across * side * side).view(down, across, side, side).transpose(1, 2)
    canvas = unpad_image(raster.reshape(1, down * side, across * side), size)[0]  # crops both sides equally
    square_tokens = side * side
    square_of = canvas // square_tokens
    rows, columns = canvas.shape
    ratio = 1.0 if max_squares is None else sqrt(rows * columns / (max_squares * square_tokens))
    is_resized = ratio > 1.1
    if is_resized:
        rows, columns = int(rows // ratio), int(columns // ratio)
        square_of = interpolate(square_of[None, None].double(), (rows, columns), mode="nearest-exact")[0, 0].long()
    squares, tile_of = square_of.unique(return_inverse=True)

    grids: list[tuple[int, int]] = [(side, side)]  # the overview is the first square and the first tile
    boxes: list[Box | None] = [None]
    for tile in range(len(squares)):
        cells = (tile_of == tile).nonzero()
        top, left = cells[0].tolist()
        bottom, right = (cells[-1] + 1).tolist()
        grids.append((bottom - top, right - left))
        boxes.append((top / rows, left / columns, bottom / rows, right / columns))
    overview = torch.arange(square_tokens)
    canvas_rows = square_tokens + torch.arange(rows * (columns + 1)).view(rows, columns + 1)[:, :columns]
    return Layout(
        patches=(1 + down * across) * square_tokens,
        tiles=Tiles(
            ids=torch.cat([torch.zeros_like(overview), 1 + tile_of.flatten()]),
            grids=tuple(grids),
            boxes=tuple(boxes),
            canvas=(rows, columns),
        ),
        connector_rows=torch.cat([overview, square_tokens + canvas.flatten()]),
        connector_canvas=(canvas.shape[0], canvas.shape[1]) if is_resized else None,
        embed_rows=torch.cat([overview, canvas_rows.flatten()]),
    )


@processed_by(PrunedLlavaNextProcessor)
class PrunedLlavaNextForConditionalGeneration(PrunedModel, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with pruned images."""

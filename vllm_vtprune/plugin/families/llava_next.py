"""LLaVA-NeXT (``LlavaNextForConditionalGeneration`` with a CLIP encoder): an overview, and squares cut out ("anyres").

The image is scaled to the best of some sizes, padded and cut into squares; each of them, and the whole image scaled to
one square, is encoded by itself. What the language model reads is the overview's tokens in raster order, then those of
all squares in one raster, the canvas, from which the rows or columns of padding are cut off. After each row of the
canvas stands a newline (`vllm_vtprune.sequence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import sqrt
from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration, LlavaNextMultiModalProcessor

from vllm_vtprune.features import Box, Layout, Tiles
from vllm_vtprune.plugin.families.clip import ATTENTION, has_clip, side
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor


class PrunedLlavaNextProcessor(PruningProcessor, LlavaNextMultiModalProcessor):
    """One image is an overview of 576 tokens and up to 2,304 of the squares, a newline after each of their rows."""

    family = Family(
        name="llava_next",
        clip_alpha=0.75,
        provides=frozenset({"cls_attention", "overview_attention", "keys", "positions"}),
        connector="multi_modal_projector",
        fixed_length=False,
        attention=ATTENTION,
    )

    @classmethod
    def prunes(cls, config: Any) -> bool:
        return has_clip(config)

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        return anyres_of(self.info.get_hf_config(), item["image_sizes"].data)


def anyres_of(config: Any, size: torch.Tensor, *, most: int | None = None) -> Layout:
    """The layout of an image for a model with this config; `size` and `most` as of `anyres`."""
    height, width = size.tolist()
    return anyres(
        (height, width),
        pinpoints=tuple((int(rows), int(columns)) for rows, columns in config.image_grid_pinpoints),
        image_size=config.vision_config.image_size,
        side=side(config),
        most=most,
    )


@lru_cache(maxsize=64)
def anyres(
    size: tuple[int, int],
    *,
    pinpoints: tuple[tuple[int, int], ...],
    image_size: int,
    side: int,
    most: int | None = None,
) -> Layout:
    """The layout of an image.

    Args:
        size: height and width of the image, in pixels.
        pinpoints: heights and widths, in pixels, to which an image may be scaled.
        image_size: pixels of a square's side.
        side: tokens of a square's side.
        most: squares whose tokens a canvas may have; one that has over 1.21 times as many is scaled down to them.
    """
    down, across = get_anyres_image_grid_shape(size, [list(point) for point in pinpoints], image_size)
    raster = torch.arange(down * across * side * side).view(down, across, side, side).transpose(1, 2)
    canvas = unpad_image(raster.reshape(1, down * side, across * side), size)[0]  # cuts as many from either side
    seen = side * side
    square_of = canvas // seen
    rows, columns = canvas.shape
    ratio = 1.0 if most is None else sqrt(rows * columns / (most * seen))
    scaled = ratio > 1.1
    if scaled:
        rows, columns = int(rows // ratio), int(columns // ratio)
        square_of = interpolate(square_of[None, None].double(), (rows, columns), mode="nearest-exact")[0, 0].long()
    squares, tile_of = square_of.unique(return_inverse=True)

    grids: list[tuple[int, int]] = [(side, side)]  # the overview, which is the first square and the first tile
    boxes: list[Box | None] = [None]
    for tile in range(len(squares)):
        place = (tile_of == tile).nonzero()
        top, left = place[0].tolist()
        bottom, right = (place[-1] + 1).tolist()
        grids.append((bottom - top, right - left))
        boxes.append((top / rows, left / columns, bottom / rows, right / columns))
    overview = torch.arange(seen)
    return Layout(
        patches=(1 + down * across) * seen,
        tiles=Tiles(
            ids=torch.cat([torch.zeros_like(overview), 1 + tile_of.flatten()]),
            grids=tuple(grids),
            boxes=tuple(boxes),
            canvas=(rows, columns),
        ),
        sources=torch.cat([overview, seen + canvas.flatten()]),
        scaled=(canvas.shape[0], canvas.shape[1]) if scaled else None,
        places=torch.cat(
            [overview, (seen + torch.arange(rows * (columns + 1)).view(rows, columns + 1)[:, :columns]).flatten()]
        ),
    )


@processed_by(PrunedLlavaNextProcessor)
class PrunedLlavaNextForConditionalGeneration(PrunedModel, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT, which also takes pruned images."""

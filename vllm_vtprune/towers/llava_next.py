"""LLaVA-NeXT: LLaVA's encoder and projector on an overview of the image and on squares cut out of it ("anyres").

The image is scaled to the best of some sizes, padded and cut into squares; each of them, and the whole image scaled to
one square, is encoded by itself. What the language model reads is the overview's tokens in raster order, then those of
all squares in one raster, the canvas, from which the rows or columns of padding are cut off. After each row of the
canvas stands a learnt embedding, the newline.

Newlines are structure, not content: they are no tokens of `VisualFeatures`, they take no part in a selection and do not
count against a budget. A row keeps its newline as long as one of its tokens stays, and one that never had a token (of
an image more than 72 times as high as wide) keeps it too: with every token kept, the sequence is the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vllm_vtprune.features import Box, PreparedImage, Tiles, VisualFeatures
from vllm_vtprune.towers import clip
from vllm_vtprune.towers.clip import ClipTower, ClipVision, Seen

if TYPE_CHECKING:
    from vllm_vtprune.plan import PruningPlan

__all__ = ["ALIASES", "Layout", "LlavaNextTower", "build_module", "layout"]

ALIASES: Mapping[str, tuple[str, ...]] = {**clip.ALIASES, "image_newline": ("image_newline", "model.image_newline")}

OVERVIEW = 0  # the overview is the first square, and the first tile


class LlavaNextVision(ClipVision):
    """The parameters of the tower, named as in transformers' LlavaNextModel."""

    image_newline: nn.Parameter


def build_module(config: Any) -> LlavaNextVision:
    """As `clip.build_module`, with the newline."""
    plain = clip.build_module(config)
    module = LlavaNextVision()
    module.vision_tower, module.multi_modal_projector = plain.vision_tower, plain.multi_modal_projector
    module.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size, device="meta"))
    return module


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of an image come from, in the order in which the model reads them, and how they lie.

    Attributes:
        squares: how many, with the overview.
        sources: (N,) int64 positions among the tokens of all squares, one square after the other.
        tiles: the overview, and the part of each square that is not padding; of size 0: no tile.
    """

    squares: int
    sources: Tensor
    tiles: Tiles


@lru_cache(maxsize=64)
def layout(height: int, width: int, *, pinpoints: tuple[tuple[int, int], ...], image_size: int, side: int) -> Layout:
    """The layout of an image of `height` x `width` pixels.

    `pinpoints`: heights and widths, in pixels, to which an image may be scaled. `image_size`, `side`: pixels and tokens
    of a square's side.
    """
    sizes = [list(point) for point in pinpoints]
    down, across = get_anyres_image_grid_shape((height, width), sizes, image_size)
    raster = torch.arange(down * across * side * side).view(down, across, side, side).transpose(1, 2)
    canvas = unpad_image(raster.reshape(1, down * side, across * side), (height, width))[0]  # as many from either side
    rows, columns = canvas.shape
    top, left = (down * side - rows) // 2, (across * side - columns) // 2

    grids: list[tuple[int, int]] = [(side, side)]
    boxes: list[Box | None] = [None]
    tile_of = torch.zeros(down * across, dtype=torch.long)
    for square in range(down * across):
        first_row, last_row = _within(square // across * side - top, side, rows)
        first_column, last_column = _within(square % across * side - left, side, columns)
        if first_row < last_row and first_column < last_column:
            tile_of[square] = len(grids)
            grids.append((last_row - first_row, last_column - first_column))
            boxes.append((first_row / rows, first_column / columns, last_row / rows, last_column / columns))
    seen = side * side
    return Layout(
        squares=1 + down * across,
        sources=torch.cat([torch.arange(seen), seen + canvas.flatten()]),
        tiles=Tiles(
            ids=torch.cat([torch.full((seen,), OVERVIEW), tile_of[canvas.flatten() // seen]]),
            grids=tuple(grids),
            boxes=tuple(boxes),
            canvas=(rows, columns),
        ),
    )


def _within(start: int, length: int, end: int) -> tuple[int, int]:
    """The part of [start, start + length) that lies in [0, end)."""
    return min(max(start, 0), end), min(max(start + length, 0), end)


class LlavaNextTower(ClipTower):
    """The tower of LlavaNextForConditionalGeneration with a CLIP encoder.

    `seed`: None reads `model_dir`; a number fills the tower with random weights instead. Raises TowerError where the
    config is not supported or the files do not fit.
    """

    def __init__(
        self, model_dir: Path, *, hf_config: Any, dtype: torch.dtype, device: torch.device, seed: int | None
    ) -> None:
        module = build_module(hf_config)
        self._pinpoints = tuple((int(height), int(width)) for height, width in hf_config.image_grid_pinpoints)
        super().__init__(
            model_dir, hf_config=hf_config, module=module, aliases=ALIASES, dtype=dtype, device=device, seed=seed
        )
        self.image_newline = module.image_newline.detach()  # (d,)

    def blank(self) -> PreparedImage:
        size = self._image_size
        squares = self._layout(torch.tensor([size, size])).squares
        return {"pixel_values": torch.zeros(squares, 3, size, size), "image_sizes": torch.tensor([size, size])}

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """As `VisionTower.encode`, for images in squares.

        `pixel_values`: (squares, 3, S, S), the overview first; those beyond the image's own number are padding.
        `image_sizes`: (2,) height and width in pixels.

        The features are those of `clip.Seen`, without newlines; CLS attention is each square's own.
        `overview_attention` is that of the first layer.
        """
        size = self._image_size
        layouts = [self._layout(image["image_sizes"]) for image in images]
        for image, its in zip(images, layouts, strict=True):
            shape = tuple(image["pixel_values"].shape)
            if len(shape) != 4 or shape[0] < its.squares or shape[1:] != (3, size, size):
                raise ValueError(f"pixel_values have shape {shape}; expected ({its.squares}, 3, {size}, {size})")
        if not images:
            return []

        pixels = [image["pixel_values"][: its.squares] for image, its in zip(images, layouts, strict=True)]
        seen = self.see(torch.cat(pixels), early=True)
        features, first = [], 0
        for its in layouts:
            features.append(self._features(seen, first, its))
            first += its.squares
        return features

    def _features(self, seen: Seen, first: int, its: Layout) -> VisualFeatures:
        """Those of one image, whose squares begin at `first`."""
        sources = its.sources.to(self.device)

        def placed(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[first : first + its.squares].flatten(0, 1)[sources]

        encoder, embeds = placed(seen.encoder), placed(seen.embeds)
        assert encoder is not None
        assert embeds is not None
        early = seen.early_attention
        return VisualFeatures(
            encoder=encoder,
            embeds=embeds,
            tiles=Tiles(its.tiles.ids.to(self.device), its.tiles.grids, its.tiles.boxes, its.tiles.canvas),
            cls_attention=placed(seen.cls_attention),
            overview_attention=None if early is None else early[first].clone(),
            keys=placed(seen.keys),
        )

    def _layout(self, image_size: Tensor) -> Layout:
        height, width = (int(pixels) for pixels in image_size.tolist())
        return layout(height, width, pinpoints=self._pinpoints, image_size=self._image_size, side=self._side)

    def sequence(self, features: VisualFeatures, plan: "PruningPlan") -> Tensor:
        """(T, d): the kept tokens, and a newline after the last one of each row of the canvas; see the module."""
        rows, columns = _canvas(features)
        embeds, newline = plan.embeds, self.image_newline.to(plan.embeds)
        if rows and not columns:
            return torch.cat([embeds, newline.expand(rows, -1)])
        overview = features.num_tokens - rows * columns
        row = (plan.kept - overview).div(max(columns, 1), rounding_mode="floor")  # below 0: of the overview
        ends = row >= 0
        ends[:-1] &= row[1:] != row[:-1]
        before = ends.long().cumsum(0) - ends.long()  # newlines before each token
        sequence = newline.repeat(len(embeds) + int(ends.sum()), 1)
        sequence[torch.arange(len(embeds), device=before.device) + before] = embeds
        return sequence

    def sequence_length(self, features: VisualFeatures) -> int:
        """Tokens of the whole image, with the newline of each row."""
        rows, _ = _canvas(features)
        return features.num_tokens + rows


def _canvas(features: VisualFeatures) -> tuple[int, int]:
    assert features.tiles is not None
    assert features.tiles.canvas is not None
    return features.tiles.canvas

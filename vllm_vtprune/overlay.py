"""Draw which tokens of an image are kept: dropped parts fade, and what the model never saw is hatched."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vllm_vtprune.features import Box
from vllm_vtprune.kept import KeptTile, KeptTokens

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FADED = 0.8  # share of white in a dropped part
GAP = 8  # pixels between two panels
CAPTION = 20  # height of a line of a caption with its margins, in pixels
MARGIN = 3  # pixels beside a caption
CELL = 6  # pixels: smallest side of a token whose outline is drawn
OUTLINE, HATCH = 205, 150  # grey
HATCH_STEP = 12  # pixels between two lines of the hatching
LEAST_SIDE = 384  # pixels: smaller pictures are enlarged in a figure


def draw_kept(image: Image.Image, kept: KeptTokens) -> Image.Image:
    """Fade the parts of an image whose tokens are dropped, outline those tokens, and hatch what reaches no encoder.

    An image of several tiles is drawn twice, side by side: the tiles, then the overview.

    Args:
        image: the image, of any size.
        kept: its kept tokens, as in the report of a request with `return_kept`.

    Raises:
        ValueError: the tokens have no known positions.
    """
    tiles = kept.tiles or ((KeptTile(kept.grid, WHOLE, kept.runs),) if kept.grid else ())
    if not tiles:
        raise ValueError("the tokens of this image have no known positions, so they cannot be drawn")
    picture = image.convert("RGB")
    faded = Image.blend(ImageOps.grayscale(picture).convert("RGB"), Image.new("RGB", image.size, "white"), FADED)
    masks: dict[bool, Image.Image] = {}  # key: whether it shows the overview
    backgrounds: dict[bool, Image.Image] = {}
    for tile in tiles:
        rows, columns = tile.grid
        mask = masks.setdefault(tile.box is None, Image.new("L", image.size, 0))
        background = backgrounds.setdefault(tile.box is None, _hatched(faded))
        left, top, right, bottom = edges = _pixels(_within(kept.view or WHOLE, tile.box or WHOLE), image.size)
        if right > left and bottom > top:
            is_kept = np.zeros(rows * columns, dtype=np.uint8)
            for start, length in tile.runs:
                is_kept[start : start + length] = 255
            cells = Image.fromarray(is_kept.reshape(rows, columns))
            mask.paste(cells.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
            background.paste(_outlined(faded.crop(edges), rows, columns), (left, top))
    drawn = [Image.composite(picture, backgrounds[overview], mask) for overview, mask in sorted(masks.items())]
    return side_by_side(drawn)


def _hatched(faded: Image.Image) -> Image.Image:
    """A faded image with diagonal lines."""
    pixels = np.array(faded)
    rows, columns = np.indices(pixels.shape[:2])
    pixels[(rows + columns) % HATCH_STEP < 2] = HATCH
    return Image.fromarray(pixels)


def _outlined(faded: Image.Image, rows: int, columns: int) -> Image.Image:
    """A faded image with the outlines of its cells, unless they are too small."""
    if faded.width < CELL * columns or faded.height < CELL * rows:
        return faded
    pixels: NDArray[np.uint8] = np.array(faded)
    for row in range(1, rows):
        pixels[row * faded.height // rows] = OUTLINE
    for column in range(1, columns):
        pixels[:, column * faded.width // columns] = OUTLINE
    return Image.fromarray(pixels)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, on white."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    return sheet


def enlarged(image: Image.Image) -> Image.Image:
    """The image, a whole number of times larger if it is small."""
    times = -(-LEAST_SIDE // max(image.size))
    return image if times <= 1 else image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def with_caption(picture: Image.Image, *lines: str) -> Image.Image:
    """Add lines of text below a picture, broken where they exceed its width."""
    font = ImageFont.load_default(CAPTION - 6)
    rows = [row for line in lines for row in _broken(" ".join(line.split()), picture.width - 2 * MARGIN, font)]
    sheet = Image.new("RGB", (picture.width, picture.height + CAPTION * len(rows)), "white")
    sheet.paste(picture, (0, 0))
    for number, row in enumerate(rows):
        y = picture.height + CAPTION * number + CAPTION // 2
        ImageDraw.Draw(sheet).text((MARGIN, y), row, "black", font, anchor="lm")
    return sheet


def _broken(line: str, width: float, font: Font) -> Iterator[str]:
    """The rows of a line, each at most so many pixels wide: broken at spaces, and within a word that has none."""
    while font.getlength(line) > width:
        fits = max(1, bisect_right(range(1, len(line)), width, key=lambda length: font.getlength(line[:length])))
        end = line.rfind(" ", 1, fits + 1)
        end = fits if end < 0 else end
        yield line[:end]
        line = line[end:].lstrip()
    yield line


def _within(view: Box, box: Box) -> Box:
    """Convert a box relative to the view into a box relative to the image."""
    top, left, bottom, right = view
    height, width = bottom - top, right - left
    return top + box[0] * height, left + box[1] * width, top + box[2] * height, left + box[3] * width


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels."""
    width, height = size
    top, left, bottom, right = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)

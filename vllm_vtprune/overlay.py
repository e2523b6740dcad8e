"""Draw which tokens of an image are kept: dropped parts fade."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from vllm_vtprune.features import Box, VisualFeatures

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FADED = 0.8  # share of white in a dropped part
GAP = 8  # pixels between two panels
CAPTION = 20  # height of a caption with its margins, in pixels


def draw_kept(image: Image.Image, features: VisualFeatures, kept: Tensor, view: Box = WHOLE) -> Image.Image:
    """Fade the parts of an image whose tokens are dropped.

    An image of several tiles is drawn twice, side by side: the tiles, then the overview.

    Args:
        image: the image, of any size.
        features: its visual tokens.
        kept: (k,) indices of the kept tokens.
        view: the part of the image that reaches the encoder; the remainder fades, too.

    Raises:
        ValueError: the tokens have no known positions.
    """
    if not features.grids:
        raise ValueError("the tokens of this image have no known positions, so they cannot be drawn")
    is_kept = np.zeros(features.num_tokens, dtype=np.uint8)
    is_kept[kept.cpu().numpy()] = 255
    panels: dict[bool, Image.Image] = {}  # key: whether it shows the overview
    for (positions, (rows, columns)), box in zip(features.planes(), features.boxes, strict=True):
        mask = panels.setdefault(box is None, Image.new("L", image.size, 0))
        left, top, right, bottom = _pixels(_within(view, box or WHOLE), image.size)
        if right > left and bottom > top:
            cells = Image.fromarray(is_kept[positions.cpu().numpy()].reshape(rows, columns))
            mask.paste(cells.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    picture = image.convert("RGB")
    faded = Image.blend(ImageOps.grayscale(picture).convert("RGB"), Image.new("RGB", image.size, "white"), FADED)
    drawn = [Image.composite(picture, faded, mask) for _, mask in sorted(panels.items())]
    sheet = Image.new("RGB", (sum(panel.width for panel in drawn) + GAP * (len(drawn) - 1), image.height), "white")
    for number, panel in enumerate(drawn):
        sheet.paste(panel, (number * (image.width + GAP), 0))
    return sheet


def with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Add a line of text below a picture, cut off at its width."""
    sheet = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    sheet.paste(picture, (0, 0))
    font = ImageFont.load_default(CAPTION - 6)
    ImageDraw.Draw(sheet).text((3, picture.height + CAPTION // 2), caption, "black", font, anchor="lm")
    return sheet


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

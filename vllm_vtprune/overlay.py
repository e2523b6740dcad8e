"""Which tokens of an image are kept, drawn on the image: what is dropped fades."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from vllm_vtprune.features import Box, VisualFeatures

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FADED = 0.8  # of a dropped part's colours, replaced by white
GAP = 8  # pixels between two panels
CAPTION = 20  # pixels that a caption is high, with the room around it


def draw_kept(image: Image.Image, features: VisualFeatures, kept: Tensor, view: Box = WHOLE) -> Image.Image:
    """The image with the parts faded whose tokens are dropped.

    An image of several tiles is shown twice, side by side: first what the tiles show, then what the overview shows.

    Args:
        image: of any size.
        features: of that image.
        kept: (k,) positions of the tokens that are kept.
        view: the part of the image that the model sees; the rest fades too.

    Raises:
        ValueError: when the tokens have no known place.
    """
    if not features.grids:
        raise ValueError("the tokens of this image have no known place, so they cannot be drawn")
    chosen = np.zeros(features.num_tokens, dtype=np.uint8)
    chosen[kept.cpu().numpy()] = 255
    panels: dict[bool, Image.Image] = {}  # by whether it is the overview's
    for (positions, (rows, columns)), box in zip(features.planes(), features.boxes, strict=True):
        mask = panels.setdefault(box is None, Image.new("L", image.size, 0))
        left, top, right, bottom = _pixels(_within(view, box or WHOLE), image.size)
        if right > left and bottom > top:
            cells = Image.fromarray(chosen[positions.cpu().numpy()].reshape(rows, columns))
            mask.paste(cells.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    picture = image.convert("RGB")
    faded = Image.blend(ImageOps.grayscale(picture).convert("RGB"), Image.new("RGB", image.size, "white"), FADED)
    drawn = [Image.composite(picture, faded, mask) for _, mask in sorted(panels.items())]
    sheet = Image.new("RGB", (sum(panel.width for panel in drawn) + GAP * (len(drawn) - 1), image.height), "white")
    for number, panel in enumerate(drawn):
        sheet.paste(panel, (number * (image.width + GAP), 0))
    return sheet


def with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """A picture with a line of text below it, cut off where the picture ends."""
    sheet = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    sheet.paste(picture, (0, 0))
    font = ImageFont.load_default(CAPTION - 6)
    ImageDraw.Draw(sheet).text((3, picture.height + CAPTION // 2), caption, "black", font, anchor="lm")
    return sheet


def _within(view: Box, box: Box) -> Box:
    """A box of the view as a box of the image."""
    top, left, bottom, right = view
    height, width = bottom - top, right - left
    return top + box[0] * height, left + box[1] * width, top + box[2] * height, left + box[3] * width


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in pixels."""
    width, height = size
    top, left, bottom, right = box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)

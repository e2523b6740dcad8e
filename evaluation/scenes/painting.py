"""Paint scenes: shapes and text over plain grounds, textures and photographs.

Nothing is downloaded and no system font is used. Fonts are those inside matplotlib's wheel, handwritten digits those
inside scikit-learn's (1,797 of them, 8 x 8 pixels, from the UCI repository), photographs those inside scikit-image's
and scikit-learn's. No two splits share a photograph, a handwritten digit or a tone of a plain ground.
"""

import csv
import gzip
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vllm_vtprune_evaluation.photo import package_file, package_photograph
from vllm_vtprune_evaluation.scenes.labels import mark_radius
from vllm_vtprune_evaluation.scenes.layout import Item, Scene
from vllm_vtprune_evaluation.scenes.splits import SPLITS, Draws, Split

Colour = tuple[int, int, int]

PAINTS: dict[str, Colour] = {
    "red": (214, 32, 36),
    "orange": (245, 135, 20),
    "yellow": (250, 222, 40),
    "green": (40, 160, 60),
    "blue": (36, 84, 214),
    "purple": (142, 52, 178),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
DARK_EDGE = ("white", "yellow", "orange")  # outlined in black; other colours in white

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-Bold",
    "STIXGeneralBol",
    "cmb10",
)
PHOTOGRAPHS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/brick.png"),
        ("skimage", "data/grass.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/camera.png"),
        ("sklearn", "datasets/images/flower.jpg"),
    ),
    "validation": (("skimage", "data/rocket.jpg"), ("skimage", "data/coins.png")),
    "test": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/gravel.png"),
        ("sklearn", "datasets/images/china.jpg"),
    ),
}
ENLARGED = 3  # shapes are drawn this many times larger, then reduced, for smooth edges

_photograph = cache(package_photograph)


def paint(scene: Scene) -> Image.Image:
    """Paint a scene: RGB, `scene.side` pixels square (336 for a grid of 24)."""
    picture = _ground(scene)
    for item in scene.items:
        layer, mask, corner = _painted(item, scene)
        picture.paste(layer, corner, mask)
    return picture


def _ground(scene: Scene) -> Image.Image:
    draws = Draws("ground", scene.split, scene.seed, scene.grid)
    if scene.ground == "photograph":
        photo = _photograph(*draws.pick(PHOTOGRAPHS[scene.split]))
        size = int(min(photo.size) * draws.real(0.5, 1.0))
        left, top = draws.whole(0, photo.width - size), draws.whole(0, photo.height - size)
        crop = photo.resize((scene.side, scene.side), box=(left, top, left + size, top + size))
        faded = Image.new("RGB", crop.size, _tone(draws, scene.split))
        return Image.blend(crop, faded, draws.real(0.1, 0.6))
    if scene.ground == "texture":
        return _texture(draws, scene)
    return Image.new("RGB", (scene.side, scene.side), _tone(draws, scene.split))


def _tone(draws: Draws, split: Split) -> Colour:
    """A muted colour. Red modulo 3 depends on the split, so no two splits share a tone."""
    grey = draws.whole(40, 215)
    red, green, blue = (grey + draws.whole(-24, 24) for _ in range(3))
    return red // 3 * 3 + SPLITS.index(split), green, blue


def _texture(draws: Draws, scene: Scene) -> Image.Image:
    """Stripes, checks, speckles or clouds of two tones."""
    first, second = (np.array(_tone(draws, scene.split), dtype=np.float32) for _ in range(2))
    rows, columns = np.mgrid[0 : scene.side, 0 : scene.side].astype(np.float32)
    angle, width = draws.real(0, np.pi), draws.real(5, 40)
    along, across = ((rows * np.sin(turn) + columns * np.cos(turn)) / width for turn in (angle, angle + np.pi / 2))
    kind = draws.pick(("stripes", "checks", "speckles", "clouds"))
    if kind == "stripes":
        share = 0.5 + 0.5 * np.sin(np.pi * along)
    elif kind == "checks":
        share = ((np.floor(along) + np.floor(across)) % 2).astype(np.float32)
    else:
        cells = scene.side // (3 if kind == "speckles" else 40) + 2
        noise = np.random.RandomState(draws.whole(0, 1 << 30)).random_sample((cells, cells))
        image = Image.fromarray((noise * 255).astype(np.uint8)).resize(
            (scene.side, scene.side), Image.Resampling.BICUBIC
        )
        share = np.asarray(image, dtype=np.float32) / 255
    pixels = first + (second - first) * share[..., None] * draws.real(0.3, 1.0)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _painted(item: Item, scene: Scene) -> tuple[Image.Image, Image.Image, tuple[int, int]]:
    """An item with its outline, the mask, and the top left corner in the picture."""
    draws = Draws("look", item.look)
    left, top = int(item.left) - 2, int(item.top) - 2
    width, height = int(item.right) + 3 - left, int(item.bottom) + 3 - top
    x, y = item.x - left, item.y - top
    if item.kind == "shape":
        ink, dot = _shape_mask(item, draws, x, y, (width, height))
    elif item.kind == "digit":
        ink, dot = _digit_mask(item, draws, x, y, (width, height), scene.split), None
    else:
        ink, dot = _text_mask(item, draws, x, y, (width, height)), None
    outline = ink.filter(ImageFilter.MaxFilter(3))
    edge = PAINTS["black" if item.colour in DARK_EDGE else "white"]
    layer = Image.new("RGB", (width, height), edge)
    layer.paste(_varied(item.colour, draws), mask=ink)
    if dot is not None:
        layer.paste(_varied(item.mark, draws), mask=dot)
    return layer, outline, (left, top)


def _varied(colour: str, draws: Draws) -> Colour:
    red, green, blue = (min(255, max(0, value + draws.whole(-10, 10))) for value in PAINTS[colour])
    return red, green, blue


def _shape_mask(
    item: Item, draws: Draws, x: float, y: float, size: tuple[int, int]
) -> tuple[Image.Image, Image.Image | None]:
    radius = item.width / 2
    turn = draws.real(-0.15, 0.15)
    large = (size[0] * ENLARGED, size[1] * ENLARGED)
    ink = Image.new("L", large)
    ImageDraw.Draw(ink).polygon(
        [
            (ENLARGED * (x + radius * r * np.sin(angle + turn)), ENLARGED * (y - radius * r * np.cos(angle + turn)))
            for angle, r in _outline(item.shape)
        ],
        fill=255,
    )
    dot = None
    if item.mark:
        dot = Image.new("L", large)
        reach = mark_radius(item)
        ImageDraw.Draw(dot).ellipse([ENLARGED * (v + side * reach) for side in (-1, 1) for v in (x, y)], fill=255)
        dot = dot.resize(size, Image.Resampling.BOX)
    return ink.resize(size, Image.Resampling.BOX), dot


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners: angle, clockwise from the top, and distance from the centre in half widths."""
    if shape == "circle":
        return tuple((2 * np.pi * k / 40, 1.0) for k in range(40))
    if shape == "square":
        return tuple((np.pi / 4 + np.pi / 2 * k, 1.2) for k in range(4))
    if shape == "triangle":
        return tuple((2 * np.pi / 3 * k, 1.05) for k in range(3))
    if shape == "star":
        return tuple((np.pi / 5 * k, 1.05 if k % 2 == 0 else 0.45) for k in range(10))
    if shape == "diamond":
        return tuple((np.pi / 2 * k, 1.0 if k % 2 == 0 else 0.7) for k in range(4))
    arm = np.arctan2(0.3, 1.0)
    reach, notch = float(np.hypot(0.3, 1.0)), float(np.hypot(0.3, 0.3))
    corners = [(-arm, reach), (arm, reach), (np.pi / 4, notch)]
    return tuple((angle + np.pi / 2 * k, distance) for k in range(4) for angle, distance in corners)


def _digit_mask(item: Item, draws: Draws, x: float, y: float, size: tuple[int, int], split: Split) -> Image.Image:
    """An enlarged handwritten digit. Of every ten, eight are for training, one for validation, one for test."""
    pixels, values = _handwriting()
    of_split = {"train": np.arange(len(values)) % 10 < 8, "validation": np.arange(len(values)) % 10 == 8}
    wanted = of_split.get(split, np.arange(len(values)) % 10 == 9) & (values == int(item.text))
    digit = pixels[draws.pick(np.flatnonzero(wanted).tolist())]
    side = round(item.width)
    image = Image.fromarray((digit * 15.9).clip(0, 255).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC).point(lambda v: min(255, max(0, (v - 70) * 3)))
    mask = Image.new("L", size)
    mask.paste(image, (round(x - side / 2), round(y - side / 2)))
    return mask


def _text_mask(item: Item, draws: Draws, x: float, y: float, size: tuple[int, int]) -> Image.Image:
    """Capitals and digits, evenly spaced, as large as their cells allow; wide ones are squeezed."""
    cell = int(item.pitch) - 1
    font = _fitting_font(draws.pick(FONTS), cell, int(0.92 * item.height))
    mask = Image.new("L", size)
    for index, character in enumerate(item.text):
        left, top, right, bottom = map(int, font.getbbox(character))
        glyph = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(glyph).text((-left, -top), character, font=font, fill=255)
        if glyph.width > cell:
            glyph = glyph.resize((cell, glyph.height))
        centre = x + (index + 0.5 - len(item.text) / 2) * item.pitch
        mask.paste(glyph, (round(centre - glyph.width / 2), round(y - glyph.height / 2)))
    return mask


@cache
def _fitting_font(name: str, width: int, height: int) -> ImageFont.FreeTypeFont:
    """The font at the largest size at which H and 0 fit into a cell."""
    path = package_file("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf")
    for size in range(2 * height, 4, -1):
        font = ImageFont.truetype(path, size)
        boxes = [font.getbbox(character) for character in "H0"]
        if max(box[2] - box[0] for box in boxes) <= width and max(box[3] - box[1] for box in boxes) <= height:
            break
    return font


@cache
def _handwriting() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (1797, 8, 8), from 0 to 16, and their digits (1797,)."""
    with gzip.open(package_file("sklearn", "datasets/data/digits.csv.gz"), "rt") as file:
        table = np.array([[float(cell) for cell in line] for line in csv.reader(file)], dtype=np.float32)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)

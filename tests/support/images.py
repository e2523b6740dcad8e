"""A fixed, varied set of images: photographs that come in installed wheels, and pictures drawn on the spot."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vllm_vtprune_evaluation.photo import package_photograph, photograph


def sample_images(n: int, stamp: str = "") -> list[Image.Image]:
    """The first `n` of the set, RGB and pairwise different; the same ones in every run.

    With a `stamp` written on them they are other images, which no cache has seen under another stamp.
    """
    if n > len(_MAKERS):
        raise ValueError(f"the set has {len(_MAKERS)} images, not {n}")
    images = [make().convert("RGB") for make in _MAKERS[:n]]
    for image in images:
        if stamp:
            ImageDraw.Draw(image).text(
                (2, 2), stamp, "white", ImageFont.load_default(10), stroke_width=1, stroke_fill="black"
            )
    return images


def _skimage(name: str) -> Image.Image:
    return package_photograph("skimage", f"data/{name}")


def _sklearn(name: str) -> Image.Image:
    return package_photograph("sklearn", f"datasets/images/{name}")


def _noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _gradient(width: int, height: int) -> Image.Image:
    across, down = np.linspace(0, 255, width), np.linspace(255, 0, height)
    red, green = np.broadcast_to(across, (height, width)), np.broadcast_to(down[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, (red + green) / 2], axis=-1).astype(np.uint8))


def _text_page(width: int, height: int) -> Image.Image:
    page = Image.new("RGB", (width, height), "white")
    lines = [f"{i + 1}. The bus to the old harbour leaves at {6 + i}:{7 * i % 60:02}." for i in range(14)]
    ImageDraw.Draw(page).multiline_text((24, 24), "\n".join(lines), "black", ImageFont.load_default(22), spacing=10)
    return page


_MAKERS: tuple[Callable[[], Image.Image], ...] = (
    photograph,
    lambda: _skimage("chelsea.png"),  # a cat, 451 x 300
    lambda: Image.new("RGB", (336, 336), (200, 30, 30)),
    lambda: _noise(640, 360, seed=1),
    lambda: _text_page(600, 500),
    lambda: _skimage("coffee.png"),  # 600 x 400
    lambda: photograph().crop((100, 0, 356, 512)),  # tall
    lambda: _gradient(500, 125),  # four times as wide as high
    lambda: _sklearn("flower.jpg"),
    lambda: ImageOps.mirror(photograph()),
    lambda: _skimage("rocket.jpg"),
    lambda: _skimage("page.png"),  # a scan, grey
    lambda: _skimage("coins.png"),  # grey
    lambda: photograph().rotate(90),
    lambda: Image.new("RGB", (64, 800), (0, 0, 0)),
    lambda: _sklearn("china.jpg"),
    lambda: photograph().resize((48, 48)),  # smaller than the encoder's input
    lambda: _skimage("hubble_deep_field.jpg"),  # 1000 x 872
    lambda: _skimage("brick.png"),
    lambda: ImageOps.flip(photograph()).crop((0, 0, 512, 200)),
    lambda: _skimage("retina.jpg"),  # 1411 x 1411
    lambda: _noise(336, 336, seed=2),
    lambda: _skimage("moon.png"),
    lambda: photograph().crop((150, 0, 310, 160)),
)

"""A photograph from an installed package, and data URLs of images."""

import base64
import io
from importlib.util import find_spec
from pathlib import Path

from PIL import Image


def photograph() -> Image.Image:
    """An astronaut before a space shuttle and a flag: 512 x 512, RGB.

    Eileen Collins, photographed by NASA in 1993 (in the public domain). The file is `data/astronaut.png` inside
    scikit-image's wheel; it is opened as a file, so nothing is downloaded and scikit-image itself is not imported.
    """
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the demo's photograph comes with scikit-image: pip install 'vllm-vtprune[demo]'")
    with Image.open(Path(package.origin).parent / "data" / "astronaut.png") as image:
        return image.convert("RGB")


def data_url(image: Image.Image) -> str:
    """The image as a data URL of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

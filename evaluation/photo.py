"""Photographs from installed packages; images as data URLs, and in messages of a chat."""

import base64
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

Message = dict[str, Any]


def package_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent / file


def package_photograph(package: str, file: str) -> Image.Image:
    """A photograph, RGB, from a file of an installed package; see `package_file`."""
    with Image.open(package_file(package, file)) as image:
        return image.convert("RGB")


def photograph() -> Image.Image:
    """An astronaut before a space shuttle and a flag: 512 x 512, RGB.

    Eileen Collins, photographed by NASA in 1993 (in the public domain).
    """
    return package_photograph("skimage", "data/astronaut.png")


def data_url(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """The image as a ``data:`` URL of a file in this format, written with these options of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def message(text: str, images: Sequence[str] = ()) -> Message:
    """A user's message: images (URLs), then text."""
    parts: list[Message] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

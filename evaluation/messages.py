"""A user's message with images, as the chat API takes it."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

Message = dict[str, Any]


def data_url(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """The image as a ``data:`` URL of a file in this format, written with these options of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def message(text: str, images: Sequence[str] = ()) -> Message:
    """A user's message: images (URLs), then text."""
    parts: list[Message] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

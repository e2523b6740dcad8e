"""Errors of a client's making, as vLLM's handlers turn them into OpenAI's shape with status 400."""

from __future__ import annotations

import base64
import binascii
import io
import reprlib
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError
from vllm.exceptions import VLLMValidationError

from server.protocol import ImagePart

DATA_URL = "data:image/<format>;base64,<the file's bytes in base64>"


class InvalidField(VLLMValidationError):
    """A field that cannot be accepted; its message already says which."""

    def __str__(self) -> str:
        return str(self.args[0])


def explain_image_error(images: Sequence[ImagePart], error: Exception) -> InvalidField | None:
    """What is wrong with the images of a request that could not be rendered; None if they are not to blame.

    Looks at the images after the fact, so that a sound request pays nothing.

    Args:
        images: the images of the request.
        error: what rendering the request raised.
    """
    for image in images:
        problem = _missing(error) if image.url is None else _url_problem(image.url)
        if problem is not None:
            param = f"{image.param}.image_url"
            return InvalidField(f"{param}: {problem}", parameter=param)
    return None


def _missing(error: Exception) -> str | None:
    # The words of vLLM 0.32.0 for an item that comes with a uuid alone (multimodal/processing/processor.py).
    if "data is not provided" in str(error):
        return f"null given, and nothing is remembered under this uuid (any more); expected {DATA_URL}."
    return None


def _url_problem(url: str) -> str | None:
    shown = reprlib.repr(url)
    if url.startswith(("http://", "https://", "file://")):
        return None
    if not url.startswith("data:"):
        return f"{shown} is not a URL of an image; expected {DATA_URL}."
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        return f"{shown} is not a base64 data URL; expected {DATA_URL}."
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return f"{shown} does not hold valid base64; expected {DATA_URL}."
    try:
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
    except UnidentifiedImageError:
        return f"{shown} holds {len(raw)} bytes that are no image in a known format; expected {DATA_URL}."
    except Exception as error:
        return f"{shown} holds an image that cannot be decoded ({type(error).__name__}); expected {DATA_URL}."
    return None

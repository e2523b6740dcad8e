"""Decode images from clients to upright RGB pixels, within limits.

Handles every image of a client, pruned or not. Ordinary images are decoded as in vLLM. In addition, sizes are checked
before decoding, and 16-bit and floating-point modes are scaled where Pillow would clip them.
"""

from __future__ import annotations

import io
from typing import Any, Protocol

import numpy as np
import pybase64
from PIL import Image, UnidentifiedImageError
from vllm import envs as vllm_envs
from vllm.multimodal.image import convert_image_mode, normalize_image, open_image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO

from vllm_vtprune import envs
from vllm_vtprune_server.problem import MIB, MediaProblem, too_large

MEGAPIXEL = 1_000_000
BYTES_PER_PIXEL = 4  # what vLLM counts for any mode


class DecodedBudget(Protocol):
    """Limit of the decoded bytes of one request's media; exists in vLLM from 0.33 on."""

    def charge(self, decoded_bytes: int) -> None:
        """Subtract bytes; raise ValueError if they exceed the remaining budget."""


class ImageIntake(ImageMediaIO):
    """Decodes images.

    Args:
        decoded_budget: the request's budget; None: only the limits of a single image.
        options: vLLM's ``image_mode`` and ``rgba_background_color`` (default: white).
    """

    def __init__(self, *, decoded_budget: DecodedBudget | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.decoded_budget = decoded_budget

    def get_max_bytes(self) -> int:
        return int(envs.max_image_mb() * MIB)

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """Decode an image: first frame, upright, in RGB unless the options differ.

        Raises:
            MediaProblem: the data is no image, broken, or exceeds a limit.
            ValueError: the image exceeds the request's budget.
        """
        self._check_bytes(len(data))
        opened = open_checked(data)
        if self.decoded_budget is not None:
            self.decoded_budget.charge(opened.width * opened.height * BYTES_PER_PIXEL)
        image = decode(opened)
        converted = image
        if self.image_mode is not None:
            scaled = image if image.mode == self.image_mode else _in_8_bits(image)
            converted = convert_image_mode(scaled, self.image_mode, self.rgba_background_color)
        config: dict[str, Any] | None = None
        if converted is not image:  # as in vLLM: part of the image's hash
            config = {"image_mode": self.image_mode, "rgba_background_color": self.rgba_background_color}
        return MediaWithBytes(converted, data, config)

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Image.Image]:
        """`load_bytes` from base64."""
        self._check_bytes(len(data) * 3 // 4 - 2)  # before decoding; up to two bytes are padding
        try:
            raw = pybase64.b64decode(data, validate=True)
        except ValueError:  # also what is not ASCII
            raise MediaProblem("does not hold valid base64") from None
        return self.load_bytes(raw)

    def _check_bytes(self, size: int) -> None:
        if size > self.get_max_bytes():
            raise too_large(self.get_max_bytes(), envs.max_image_mb.name)


def open_checked(data: bytes) -> Image.Image:
    """Read the header of an image and check its size.

    Raises:
        MediaProblem: the data is no image, broken, or exceeds a limit of pixels or aspect ratio.
    """
    try:
        image = open_image(io.BytesIO(data))
    except UnidentifiedImageError:
        raise MediaProblem(f"is not an image in a known format ({len(data)} bytes)") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels("far too many pixels") from None
    except Exception as error:
        raise _broken(error) from None
    check_size(*image.size)
    return image


def decode(image: Image.Image) -> Image.Image:
    """Decode the first frame of an opened image, upright, in its own mode.

    Raises:
        MediaProblem: the image is broken, or its real size exceeds a limit.
    """
    try:
        image.load()
        upright = normalize_image(image)
    except Exception as error:
        raise _broken(error) from None
    check_size(*upright.size)  # may differ from the header in some formats
    return upright


def check_size(width: int, height: int) -> None:
    """Reject an image that is too expensive to decode or resize.

    Raises:
        MediaProblem: too many pixels, or too large an aspect ratio.
    """
    if width * height > _pixel_limit()[0]:
        raise _too_many_pixels(f"{width} x {height} pixels")
    if max(width, height) > envs.max_image_aspect() * min(width, height):
        raise MediaProblem(
            f"has {width} x {height} pixels",
            f"a longer side of at most {envs.max_image_aspect()} times the shorter ({envs.max_image_aspect.name})",
        )


def _pixel_limit() -> tuple[float, str]:
    """The strictest limit of pixels, and its setting."""
    limits = [(envs.max_image_megapixels() * MEGAPIXEL, envs.max_image_megapixels.name)]
    if vllm_envs.VLLM_MAX_IMAGE_PIXELS > 0:
        limits.append((vllm_envs.VLLM_MAX_IMAGE_PIXELS, "VLLM_MAX_IMAGE_PIXELS"))
    if Image.MAX_IMAGE_PIXELS is not None:
        limits.append((2 * Image.MAX_IMAGE_PIXELS, "Pillow's limit"))
    return min(limits)


def _too_many_pixels(size: str) -> MediaProblem:
    limit, setting = _pixel_limit()
    return MediaProblem(f"has {size}", f"at most {limit / MEGAPIXEL:.10g} megapixels ({setting})")


def _broken(error: Exception) -> MediaProblem:
    """The problem of an image that Pillow cannot read; its own message may hold bytes of the client."""
    reason = "truncated" if "truncated" in str(error) else "truncated, damaged or of a kind that is not supported"
    return MediaProblem(f"holds an image that cannot be decoded ({reason})")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale an image with a single 16-bit, 32-bit or floating-point channel to 8 bits; return any other unchanged.

    Pillow clips such images to 255, which turns a 16-bit scan white. White is 65,535 for 16 bits; else the smallest of
    1 (floating point), 255 and 65,535 that no pixel exceeds, or the largest pixel.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(values.max(initial=0.0))
    levels = (1.0, 255.0, 65_535.0) if image.mode == "F" else (255.0, 65_535.0)
    white = next((level for level in levels if peak <= level), peak)
    if image.mode.startswith("I;16"):
        white = 65_535.0
    return Image.fromarray((values.clip(0.0, white) * (255.0 / white)).round().astype(np.uint8))

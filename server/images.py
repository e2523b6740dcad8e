"""From the bytes of an image to upright RGB pixels, within limits.

Everything that a client may send as an image passes here, pruned or not. What vLLM does with an ordinary image is done
the same way; beyond it, sizes are looked at before anything is decoded, and modes that Pillow would clip are scaled.
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
BYTES_PER_PIXEL = 4  # that vLLM counts, whatever the mode


class DecodedBudget(Protocol):
    """How much all media of one request may unpack to; vLLM has it from 0.33 on."""

    def charge(self, decoded_bytes: int) -> None:
        """Raise ValueError where that is more than is left."""


class ImageIntake(ImageMediaIO):
    """How images are decoded.

    Args:
        decoded_budget: of the request; None: no limit beyond those of a single image.
        options: as in vLLM: ``image_mode``, ``rgba_background_color`` (default: white).
    """

    def __init__(self, *, decoded_budget: DecodedBudget | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.decoded_budget = decoded_budget

    def get_max_bytes(self) -> int:
        return int(envs.max_image_mb() * MIB)

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """Decode an image: its first frame, upright, in RGB unless the options say otherwise.

        Raises:
            MediaProblem: it is no image, broken, or over a limit.
            ValueError: it is too much for the request's budget.
        """
        self._check_bytes(len(data))
        opened = open_checked(data)
        if self.decoded_budget is not None:
            self.decoded_budget.charge(opened.width * opened.height * BYTES_PER_PIXEL)
        image = decode(opened)
        converted = image
        if self.image_mode is not None:
            wanted = image if image.mode == self.image_mode else _in_8_bits(image)
            converted = convert_image_mode(wanted, self.image_mode, self.rgba_background_color)
        config: dict[str, Any] | None = None
        if converted is not image:  # as vLLM: part of the image's identity
            config = {"image_mode": self.image_mode, "rgba_background_color": self.rgba_background_color}
        return MediaWithBytes(converted, data, config)

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Image.Image]:
        """As `load_bytes`, from base64."""
        self._check_bytes(len(data) * 3 // 4 - 2)  # before it is decoded; up to two bytes are padding
        try:
            raw = pybase64.b64decode(data, validate=True)
        except ValueError:  # also what is not ASCII
            raise MediaProblem("does not hold valid base64") from None
        return self.load_bytes(raw)

    def _check_bytes(self, size: int) -> None:
        if size > self.get_max_bytes():
            raise too_large(self.get_max_bytes(), envs.max_image_mb.name)


def open_checked(data: bytes) -> Image.Image:
    """An image of which only the header was read.

    Raises:
        MediaProblem: it is no image, broken, or has more pixels or a longer side than allowed.
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
    """The first frame of an image that was opened, upright, in its own mode.

    Raises:
        MediaProblem: it is broken, or has other pixels than its header says, and more than allowed.
    """
    try:
        image.load()
        upright = normalize_image(image)
    except Exception as error:
        raise _broken(error) from None
    check_size(*upright.size)  # some formats say one size and hold another
    return upright


def check_size(width: int, height: int) -> None:
    """Refuse an image that would take too much to decode or to resize.

    Raises:
        MediaProblem: it has too many pixels, or is too long for its breadth.
    """
    if width * height > _pixel_limit()[0]:
        raise _too_many_pixels(f"{width} x {height} pixels")
    if max(width, height) > envs.max_image_aspect() * min(width, height):
        raise MediaProblem(
            f"has {width} x {height} pixels",
            f"a longer side of at most {envs.max_image_aspect()} times the shorter ({envs.max_image_aspect.name})",
        )


def _pixel_limit() -> tuple[float, str]:
    """The strictest limit, and what sets it."""
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
    return MediaProblem(f"holds an image that cannot be decoded ({type(error).__name__})")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """An image of one wide channel, scaled to 8 bits; any other as it is.

    Pillow clips such an image to 255, which turns a 16-bit scan white. What counts as white here: 65,535 in 16 bits;
    else the least of 1 (floating point), 255 and 65,535 that no pixel exceeds, or the largest pixel.
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

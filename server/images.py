"""From the bytes of an image to upright RGB pixels, within limits.

Everything that a client may send as an image passes here, pruned or not. What vLLM does with an ordinary image is done
the same way; beyond it, sizes are looked at before anything is decoded, and modes that Pillow would clip are scaled.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pybase64
from PIL import Image, UnidentifiedImageError
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.image import convert_image_mode, normalize_image, open_image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO

from vllm_vtprune import envs

MIB = 1024**2
MEGAPIXEL = 1_000_000


DATA_URL = "data:image/<format>;base64,<the file's bytes in base64>"


class ImageProblem(VLLMValidationError):
    """An image that is not taken; ``str()`` says why, to follow the name of the image.

    Attributes:
        accepted: what would be taken, in words.
    """

    def __init__(self, problem: str, accepted: str = DATA_URL) -> None:
        super().__init__(problem)
        self.accepted = accepted


class ImageIntake(ImageMediaIO):
    """How images are decoded. Options as in vLLM: ``image_mode``, ``rgba_background_color`` (default: white)."""

    def get_max_bytes(self) -> int:
        return int(envs.max_image_mb() * MIB)

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """Decode an image: its first frame, upright, in RGB unless the options say otherwise.

        Raises:
            ImageProblem: it is no image, broken, or over a limit.
        """
        check_bytes(len(data), self.get_max_bytes())
        image = decode(data)
        converted = image
        if self.image_mode is not None and image.mode != self.image_mode:
            converted = convert_image_mode(_in_8_bits(image), self.image_mode, self.rgba_background_color)
        config: dict[str, Any] | None = None
        if converted is not image:  # as vLLM: part of the image's identity
            config = {"image_mode": self.image_mode, "rgba_background_color": self.rgba_background_color}
        return MediaWithBytes(converted, data, config)

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Image.Image]:
        """As `load_bytes`, from base64."""
        check_bytes(len(data) * 3 // 4 - 2, self.get_max_bytes())  # before it is decoded; up to two bytes are padding
        try:
            raw = pybase64.b64decode(data, validate=True)
        except ValueError:  # also what is not ASCII
            raise ImageProblem("does not hold valid base64") from None
        return self.load_bytes(raw)


def check_bytes(size: int, limit: int) -> None:
    """Refuse an image of more bytes than the limit.

    Raises:
        ImageProblem: it has more.
    """
    if size > limit:
        raise ImageProblem("is too large", f"at most {limit / MIB:g} MiB")


def decode(data: bytes) -> Image.Image:
    """The first frame of an image, upright, in its own mode.

    Raises:
        ImageProblem: it is no image, broken, or has more pixels or a longer side than allowed.
    """
    try:
        image = open_image(io.BytesIO(data))  # reads the header alone
    except UnidentifiedImageError:
        raise ImageProblem(f"holds {len(data)} bytes that are no image in a known format") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels("far too many pixels") from None
    except Exception as error:
        raise _broken(error) from None
    check_size(*image.size)
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
        ImageProblem: it has too many pixels, or is too long for its breadth.
    """
    if width * height > envs.max_image_megapixels() * MEGAPIXEL:
        raise _too_many_pixels(f"{width} x {height} pixels")
    if max(width, height) > envs.max_image_aspect() * min(width, height):
        raise ImageProblem(
            f"has {width} x {height} pixels", f"a longer side of at most {envs.max_image_aspect()} times the shorter"
        )


def _too_many_pixels(found: str) -> ImageProblem:
    return ImageProblem(f"has {found}", f"at most {envs.max_image_megapixels():g} megapixels")


def _broken(error: Exception) -> ImageProblem:
    return ImageProblem(f"holds an image that cannot be decoded ({type(error).__name__})")


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

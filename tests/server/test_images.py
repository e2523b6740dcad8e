"""Images come out upright, in the right colours, and as stock vLLM gives them where they are ordinary."""

import base64
import io
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image
from vllm.multimodal.media.image import ImageMediaIO

from tests.support.chat import fresh_picture
from tests.support.images import sample_images
from vllm_vtprune import envs
from vllm_vtprune_server import images
from vllm_vtprune_server.images import ImageIntake
from vllm_vtprune_server.problem import MediaProblem

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes, **options: object) -> Image.Image:
    return ImageIntake(**options).load_bytes(data).media


def halves(left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB", size: int = 32) -> Image.Image:
    image = Image.new(mode, (2 * size, size), left)
    image.paste(right, (size, 0, 2 * size, size))
    return image


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """In the middle of the left and of the right half."""
    assert image.mode == "RGB"
    return [image.getpixel((image.width * quarter // 4, image.height // 2)) for quarter in (1, 3)]


def near(pixels: list[tuple[int, ...]], expected: list[tuple[int, ...]], tolerance: int = 3) -> bool:
    return np.abs(np.array(pixels) - np.array(expected)).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_ordinary_images_are_as_stock_vllm_decodes_and_identifies_them(format: str) -> None:
    for image in sample_images(4):
        data = saved(image, format)
        intake, stock = ImageIntake().load_bytes(data), ImageMediaIO().load_bytes(data)
        assert intake.media.mode == stock.media.mode == "RGB"
        assert intake.media.tobytes() == stock.media.tobytes()
        assert (intake.original_bytes, intake.io_config) == (stock.original_bytes, stock.io_config)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_so_are_images_in_other_modes_of_8_bits(mode: str) -> None:
    image = fresh_picture().convert(mode)
    data = saved(image, "TIFF" if mode == "CMYK" else "PNG")
    intake, stock = ImageIntake().load_bytes(data), ImageMediaIO().load_bytes(data)
    assert intake.media.tobytes() == stock.media.tobytes()
    assert intake.io_config == stock.io_config


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation: int) -> None:
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    as_taken = halves(RED, BLUE)
    turn = turns[orientation]
    upright = as_taken if turn is None else as_taken.transpose(turn)
    picture = decoded(saved(as_taken, "PNG", exif=exif))
    assert picture.size == upright.size
    assert picture.tobytes() == upright.tobytes()


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert near(colours(decoded(data)), [RED, RED]), format


def test_what_is_transparent_becomes_white_or_the_colour_asked_for() -> None:
    clear = (0, 0, 0, 0)
    rgba = halves((*RED, 255), clear, "RGBA")
    palette = halves(RED, GREEN).quantize(4)
    index = palette.getpixel((40, 5))
    transparent_palette = saved(palette, transparency=index)
    for data in (saved(rgba), saved(rgba, "WEBP", lossless=True), transparent_palette):
        assert near(colours(decoded(data)), [RED, WHITE])
        assert near(colours(decoded(data, rgba_background_color=[0, 0, 255])), [RED, BLUE])
    grey = halves((100, 255), (0, 0), "LA")
    assert near(colours(decoded(saved(grey))), [(100,) * 3, WHITE])
    half = halves((*RED, 128), (*RED, 255), "RGBA")
    assert near(colours(decoded(saved(half))), [(255, 127, 127), RED])


def test_a_colour_that_means_transparent_is_as_in_the_vllm_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.33 replaces it by the background; 0.32 leaves an image that is in RGB already."""
    data = saved(halves(RED, GREEN), transparency=GREEN)
    intake, stock = ImageIntake().load_bytes(data), ImageMediaIO().load_bytes(data)
    assert intake.media.tobytes() == stock.media.tobytes()
    assert intake.io_config == stock.io_config

    replaced = halves(RED, WHITE)
    monkeypatch.setattr(images, "convert_image_mode", lambda image, mode, background: replaced)
    late = ImageIntake().load_bytes(data)
    assert late.media is replaced
    assert late.io_config == {"image_mode": "RGB", "rgba_background_color": WHITE}


def test_cmyk_has_the_colours_that_were_printed() -> None:
    for data in (saved(halves(RED, BLUE).convert("CMYK"), "TIFF"), saved(halves(RED, BLUE).convert("CMYK"), "JPEG")):
        assert near(colours(decoded(data)), [RED, BLUE], tolerance=8)


@pytest.mark.parametrize(
    ("values", "format", "expected"),
    [
        (np.array([0, 32_768, 65_535], np.uint16), "PNG", [0, 128, 255]),
        (np.array([0, 1_000, 2_000], np.uint16), "PNG", [0, 4, 8]),  # a dark scan stays dark
        (np.array([0, 32_768, 65_535], np.uint16), "TIFF", [0, 128, 255]),
        (np.array([0, 32_768, 65_535], np.int32), "TIFF", [0, 128, 255]),
        (np.array([0, 100, 255], np.int32), "TIFF", [0, 100, 255]),
        (np.array([-5, 500_000, 1_000_000], np.int32), "TIFF", [0, 128, 255]),
        (np.array([0, 0.5, 1], np.float32), "TIFF", [0, 128, 255]),
        (np.array([0, 100, 255], np.float32), "TIFF", [0, 100, 255]),
        (np.array([np.nan, 0.5, np.inf], np.float32), "TIFF", [0, 128, 0]),
        (np.array([0, 0, 0], np.float32), "TIFF", [0, 0, 0]),
    ],
)
def test_wide_channels_are_scaled_instead_of_clipped(values: np.ndarray, format: str, expected: list[int]) -> None:
    image = Image.fromarray(np.tile(values, (3, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = decoded(saved(image, format))
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture)[1].astype(int) - np.array(expected)[:, None]).max() <= 1


def test_a_mode_that_the_operator_asked_to_keep_is_kept() -> None:
    image = halves((*RED, 255), (0, 0, 0, 0), "RGBA")
    assert decoded(saved(image), image_mode=None).mode == "RGBA"


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "size", "problem"),
    [
        (envs.max_image_megapixels.name, "0.01", (101, 100), "has 101 x 100 pixels"),
        ("VLLM_MAX_IMAGE_PIXELS", "10000", (101, 100), "has 101 x 100 pixels"),
        (envs.max_image_aspect.name, "4", (101, 25), "has 101 x 25 pixels"),
        (envs.max_image_aspect.name, "4", (25, 101), "has 25 x 101 pixels"),
    ],
)
def test_the_header_is_looked_at_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, size: tuple[int, int], problem: str
) -> None:
    monkeypatch.setenv(variable, value)
    width, height = size
    assert decoded(saved(Image.new("RGB", (width - (width > height), height - (height > width))))).mode == "RGB"
    monkeypatch.setattr(Image.Image, "load", None)  # calling it would be an error of another kind
    with pytest.raises(MediaProblem, match=problem):
        decoded(saved_without_loading(size))


@pytest.mark.parametrize(
    ("megapixels", "vllms", "accepted"),
    [
        ("0.01", "20000", "at most 0.01 megapixels (VTPRUNE_MAX_IMAGE_MEGAPIXELS)"),
        ("0.02", "10000", "at most 0.01 megapixels (VLLM_MAX_IMAGE_PIXELS)"),
        ("0.02", "0", "at most 0.02 megapixels (VTPRUNE_MAX_IMAGE_MEGAPIXELS)"),
        ("500", "12345", "at most 0.012345 megapixels (VLLM_MAX_IMAGE_PIXELS)"),
    ],
)
def test_the_stricter_limit_of_pixels_holds_and_is_named(
    monkeypatch: pytest.MonkeyPatch, megapixels: str, vllms: str, accepted: str
) -> None:
    monkeypatch.setenv(envs.max_image_megapixels.name, megapixels)
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", vllms)
    with pytest.raises(MediaProblem, match="has 200 x 150 pixels") as refused:
        decoded(saved_without_loading((200, 150)))
    assert refused.value.accepted == accepted


def test_no_setting_lifts_the_limit_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(envs.max_image_megapixels.name, "500")
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "500000000")
    with pytest.raises(MediaProblem, match="has far too many pixels") as refused:
        decoded(saved(Image.new("1", (20_000, 10_000))))
    assert refused.value.accepted == "at most 178.95697 megapixels (Pillow's limit)"


class Allowance:
    """A budget as vLLM 0.33 has it for all media of a request."""

    def __init__(self, limit: int, setting: str = "VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES") -> None:
        self.limit, self.setting = limit, setting
        self.used = 0

    def charge(self, size: int) -> None:
        if self.used + size > self.limit:
            raise ValueError(f"Request media exceed {self.setting}={self.limit}.")
        self.used += size


@pytest.mark.parametrize("mode", ["RGB", "1", "RGBA", "I;16"])
def test_the_budget_of_the_request_is_charged_before_an_image_is_decoded(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    budget = Allowance(limit=2 * 30 * 20 * 4)
    data = saved(Image.new(mode, (30, 20)))
    for number in (1, 2):
        ImageIntake(decoded_budget=budget).load_bytes(data)
        assert budget.used == number * 30 * 20 * 4
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ValueError, match="VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES"):
        ImageIntake(decoded_budget=budget).load_bytes(data)


def saved_without_loading(size: tuple[int, int]) -> bytes:
    """A bitmap whose pixels are zeros."""
    width, height = size
    row = (3 * width + 3) // 4 * 4
    header = b"BM" + (54 + row * height).to_bytes(4, "little") + b"\0" * 4 + (54).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return header + info + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + b"\0" * 24 + b"\0" * row * height


def test_a_file_over_the_limit_is_refused_before_its_base64_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(envs.max_image_mb.name, str(1 / 1024))
    for size in (1025, 1026, 1027, 5000):
        with pytest.raises(MediaProblem, match="is too large"):
            ImageIntake().load_base64("image/png", base64.b64encode(b"A" * size).decode())
    with pytest.raises(MediaProblem, match="is too large"):
        ImageIntake().load_base64("image/png", "@" * 5000)  # which is no base64
    with pytest.raises(MediaProblem, match=r"is not an image in a known format \(1024 bytes\)"):
        ImageIntake().load_base64("image/png", base64.b64encode(b"A" * 1024).decode())


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(MediaProblem, match=r"is not an image in a known format|cannot be decoded"):
        decoded(data)

"""Data URLs: base64 of one reading is read, the rest is refused."""

import base64
import re
import textwrap
from collections.abc import Callable

import pytest

from tests.server.test_images import saved
from tests.support.chat import fresh_picture
from vllm_vtprune_server import data_urls
from vllm_vtprune_server.errors import MediaRejected
from vllm_vtprune_server.media import GuardedConnector
from vllm_vtprune_server.problem import MediaProblem


def encoded(padding: int) -> str:
    """The base64 of an image, with so many ``=``, and with the characters that are written in several ways."""
    data = saved(fresh_picture())
    text = base64.b64encode(data + bytes((-len(data) - padding) % 3)).decode()  # what follows a PNG is no part of it
    assert text.count("=") == padding
    assert "+" in text
    assert "/" in text
    return text


PLAIN = encoded(padding=2)

WAYS: dict[str, Callable[[str], str]] = {
    "lines of 76": lambda text: "\r\n".join(textwrap.wrap(text, 76)) + "\r\n",
    "lines of 5": lambda text: "\n".join(textwrap.wrap(text, 5)),
    "a newline at the end": lambda text: text + "\n",
    "spaces around": lambda text: f"  {text} ",
    "spaces and newlines around": lambda text: f" \n{text}\n ",
    "no padding": lambda text: text.rstrip("="),
    "one = too many": lambda text: text + "=",
    "five = too many": lambda text: text + "=====",
    "for URLs": lambda text: text.replace("+", "-").replace("/", "_"),
    "for URLs, no padding": lambda text: text.replace("+", "-").replace("/", "_").rstrip("="),
    "escaped": lambda text: text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    "escaped in small letters": lambda text: text.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d"),
    "padding escaped": lambda text: text.replace("=", "%3D"),
    "lines, escaped": lambda text: "%0D%0A".join(textwrap.wrap(text, 76)),
}


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS.keys())
def test_base64_of_one_reading_is_read(write: Callable[[str], str], padding: int) -> None:
    plain = encoded(padding)
    for text in (plain, write(plain)):
        assert data_urls.read(f"data:image/png;base64,{text}") == ("image/png", plain)


REFUSED: dict[str, str] = {
    "a space within": f"{PLAIN[:40]} {PLAIN[40:]}",
    "a space in the place of +": PLAIN.replace("+", " "),
    "a space at an end that misses digits": f"{PLAIN.rstrip('=')} ",
    "a space before digits that miss some": f" {PLAIN.rstrip('=')}",
    "a tab within": f"{PLAIN[:40]}\t{PLAIN[40:]}",
    "a character too few": PLAIN[:-3],
    "a character too few, padded": PLAIN[:-3] + "===",
    "padding within": f"{PLAIN[:40]}=={PLAIN[40:]}",
    "two texts": PLAIN + PLAIN,
    "another alphabet": PLAIN.replace("+", "*"),
    "a letter from elsewhere": "\u0410" + PLAIN[1:],
    "half a character": "\ud800" + PLAIN[1:],
    "escaped twice": PLAIN.replace("=", "%253D"),
    "an escape cut off": PLAIN.rstrip("=") + "%3",
    "an escape across lines": PLAIN.rstrip("=") + "%\n3D%3D",
    "an escape of a letter": f"%{ord(PLAIN[0]):X}{PLAIN[1:]}",
    "a comma": f"{PLAIN[:40]},{PLAIN[40:]}",
    "a backslash": PLAIN.replace("/", "\\/"),
    "nothing but =": "@====",
}


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_base64_of_no_or_two_readings_is_refused(text: str, modality: str) -> None:
    fetch = getattr(GuardedConnector(), f"fetch_{modality}")
    with pytest.raises(MediaRejected, match=r"does not hold valid base64|could not be loaded") as refused:
        fetch(f"data:{modality}/x;base64,{text}")
    assert f"; expected data:{modality}/<format>;base64," in str(refused.value)


@pytest.mark.parametrize(
    "header", ["image/png;base64", "IMAGE/PNG;BASE64", "image/png; base64", "image/png;name=a.png;base64"]
)
def test_a_header_may_be_written_as_the_standard_allows(header: str) -> None:
    assert data_urls.read(f"data:{header},{PLAIN}") == ("image/png", PLAIN)
    assert data_urls.read(f"DATA:{header},{PLAIN}") == ("image/png", PLAIN)


@pytest.mark.parametrize("url", ["data:", "data:,", "data:image/png,abc", "data:base64,QUJD", "data:image/png;base64"])
def test_what_is_not_in_base64_is_refused(url: str) -> None:
    with pytest.raises(MediaProblem, match=re.escape("is not a base64 data URL")):
        data_urls.read(url)


def test_a_list_of_frames_is_left_to_vllm() -> None:
    frames = [base64.b64encode(saved(fresh_picture(), "JPEG")).decode() for _ in range(3)]
    url = f"data:video/jpeg;base64,{','.join(frames)}"
    assert data_urls.read(url) == ("video/jpeg", ",".join(frames))
    pixels, metadata = GuardedConnector().fetch_video(url)
    assert (pixels.shape, metadata["total_num_frames"]) == ((3, 48, 48, 3), 3)

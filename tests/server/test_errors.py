"""What clients get wrong: each mistake is named in one answer, and the server goes on."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.server.test_images import saved
from tests.support.chat import (
    MAX_REFUSAL,
    VISUAL_TOKENS,
    Body,
    Server,
    fresh_picture,
    fresh_url,
    image_part,
    kept,
    leaks,
    url_of,
    url_of_bytes,
    user,
)

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def still_serving(server: Server, default_keep: int) -> Any:
    """After every test of this file, a good request is answered, from scratch and from the caches."""
    yield
    messages = [user("Where is the dog?", fresh_url())]
    for cached in (False, True):
        [image] = server.ask(messages=messages)["pruning"]["images"]
        assert (image["kept_tokens"], image["cached"]) == (default_keep, cached)


def refusal(response: httpx.Response) -> Body:
    """The error of a response in OpenAI's shape, after checks that hold for each."""
    assert response.status_code == 400, response.text
    assert len(response.content) < MAX_REFUSAL
    assert leaks(response.text) == []
    answer = response.json()
    assert set(answer) == {"error"}
    error = answer["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["code"] == 400
    assert error["message"]
    return error


def check_named(error: Body, param: str, *shown: str) -> None:
    """The message names the field, what was given there and what is accepted."""
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    for text in (*shown, "; expected "):
        assert text in error["message"]
    assert "body." not in json.dumps(error)


# --- policies -------------------------------------------------------------------------------------------------------

# pruning field, where the mistake is below it, the value as shown, what is accepted;
# more of them, without a server, in tests/core/test_policy.py
BAD_POLICIES: dict[str, tuple[object, str, str, str]] = {
    "unknown key": ({"metod": "resprune"}, "metod", "(did you mean method?)", "one of method, budget"),
    "misspelt preset": ({"prest": "fast"}, "prest", "did you mean preset?", "preset, return_kept"),
    "unknown preset": ("blanced", "", '"blanced" is not accepted (did you mean balanced?)', "a preset: off, "),
    "misspelt method": ({"method": "resprun"}, "method", "(did you mean resprune?)", "one of none, resprune"),
    "true": (True, "", "true", "an object, false, or a preset"),
    "keep = 0": ({"budget": {"type": "tokens", "keep": 0}}, "budget.keep", "0", "an integer from 1"),
    "threshold NaN": ({"budget": {"threshold": float("nan")}}, "budget.threshold", "NaN", "above 0 and at most 1"),
    "seed too large": ({"seed": 10**400}, "seed", "1000", "an integer from 0"),
    "deep value": ({"budget": json.loads("[" * 60 + "]" * 60)}, "budget", "[[", "an object whose type is"),
    "half a character": ({"method": "\ud800"}, "method", '"\\ud800"', "one of none, resprune"),
}


@pytest.mark.parametrize(("pruning", "path", "shown", "accepted"), BAD_POLICIES.values(), ids=BAD_POLICIES.keys())
def test_a_policy_that_cannot_be_used(server: Server, pruning: object, path: str, shown: str, accepted: str) -> None:
    message = user("Where is the dog?", fresh_url())
    error = refusal(server.post({"messages": [message], "pruning": pruning}))
    check_named(error, ".".join(filter(None, ["pruning", path])), shown, accepted)


@pytest.mark.parametrize("case", ["unknown key", "unknown preset", "keep = 0"])
def test_the_same_beside_an_image(server: Server, case: str) -> None:
    pruning, path, shown, accepted = BAD_POLICIES[case]
    images = [image_part(fresh_url(), pruning="fast"), image_part(fresh_url(), pruning=pruning)]
    later = [user("Hello."), {"role": "assistant", "content": "Hello."}, user("Compare them.", *images)]
    for messages, where in (
        ([user("Compare them.", *images[1:])], "messages.0.content.0.pruning"),
        ([user("Compare them.", *images)], "messages.0.content.1.pruning"),
        (later, "messages.2.content.1.pruning"),
    ):
        error = refusal(server.post({"messages": messages}))
        check_named(error, ".".join(filter(None, [where, path])), shown, accepted)


def test_a_wrong_policy_without_any_image_is_wrong_too(server: Server) -> None:
    error = refusal(server.post({"messages": [user("Where is the dog?")], "pruning": {"alpha": -1}}))
    check_named(error, "pruning.alpha", "-1")


def test_a_stream_is_refused_before_it_begins(server: Server) -> None:
    bad_policy = {"messages": [user("Where?", fresh_url())], "pruning": {"alpha": -1}, "stream": True}
    check_named(refusal(server.post(bad_policy)), "pruning.alpha", "-1")
    bad_image = {"messages": [user("Where?", "data:image/png;base64,@")], "stream": True}
    check_named(refusal(server.post(bad_image)), "messages.0.content.0.image_url", "base64")


def test_other_processor_options_stay_refused_beside_a_policy(server: Server) -> None:
    """That our own pass does not mean that a client's do."""
    body = {"messages": [user("Where?", fresh_url())], "pruning": "fast", "mm_processor_kwargs": {"do_resize": False}}
    error = refusal(server.post(body))
    assert error["param"] == "mm_processor_kwargs"


# --- images ---------------------------------------------------------------------------------------------------------


def cut_in_half(format: str) -> str:
    data = saved(fresh_picture().resize((300, 300)), format)
    return url_of_bytes(data[: len(data) // 2], format)


def damaged_png() -> str:
    data = bytearray(saved(fresh_picture()))
    data[len(data) // 2] ^= 255
    return url_of_bytes(bytes(data))


BAD_URLS: dict[str, tuple[str, str]] = {
    "broken base64": ("data:image/png;base64,@@@@", "does not hold valid base64"),
    "half a character": ("data:image/png;base64,\ud800", "does not hold valid base64"),
    "PNG cut off": (cut_in_half("PNG"), "holds an image that cannot be decoded (truncated)"),
    "JPEG cut off": (cut_in_half("JPEG"), "holds an image that cannot be decoded (truncated)"),
    "damaged PNG": (damaged_png(), "holds an image that cannot be decoded (truncated, damaged or "),
    "no image": (url_of_bytes(b"hello world"), "is not an image in a known format (11 bytes)"),
    "no URL": ("nonsense", "'nonsense' is not a URL"),
    "empty": ("", "'' is not a URL"),
}
OVER_A_LIMIT: dict[str, tuple[Callable[[], str], str, str]] = {
    "unpacks to 144 megapixels": (
        lambda: url_of(Image.new("1", (12_000, 12_000))),
        "has 12000 x 12000 pixels",
        "at most 100 megapixels",
    ),
    "a line": (
        lambda: url_of(Image.new("RGB", (10_000, 1))),
        "has 10000 x 1 pixels",
        "a longer side of at most 512 times the shorter",
    ),
    "33 MiB": (lambda: url_of_bytes(b"\0" * (33 * 2**20)), "is too large", "at most 32 MiB"),
}


@pytest.mark.parametrize("pruning", ["fast", False], ids=["pruned", "unpruned"])
@pytest.mark.parametrize(("url", "problem"), BAD_URLS.values(), ids=BAD_URLS.keys())
def test_an_image_that_cannot_be_read(server: Server, url: str, problem: str, pruning: object) -> None:
    error = refusal(server.post({"messages": [user("Where is the dog?", url)], "pruning": pruning}))
    check_named(error, "messages.0.content.0.image_url", problem, "data:image/<format>;base64,")

    messages = [user("Hello."), {"role": "assistant", "content": "Hello."}, user("Where?", fresh_url(), url)]
    error = refusal(server.post({"messages": messages, "pruning": pruning}))
    check_named(error, "messages.2.content.1.image_url", problem)


@pytest.mark.parametrize("pruning", ["fast", False], ids=["pruned", "unpruned"])
@pytest.mark.parametrize(("make", "problem", "accepted"), OVER_A_LIMIT.values(), ids=OVER_A_LIMIT.keys())
def test_an_image_over_a_limit(
    server: Server, make: Callable[[], str], problem: str, accepted: str, pruning: object
) -> None:
    error = refusal(server.post({"messages": [user("Where is the dog?", fresh_url(), make())], "pruning": pruning}))
    check_named(error, "messages.0.content.1.image_url", problem, accepted)


@pytest.mark.parametrize("pruning", [{"budget": {"type": "tokens", "keep": 40}}, {"method": "resprune"}, False])
def test_of_several_uuids_the_one_that_is_missing_is_named(server: Server, pruning: object) -> None:
    body = {"pruning": pruning, "messages": [user("Where is the dog?", image_part(fresh_url(), uuid=f"{pruning}"))]}
    server.ask(**body)
    images = image_part(None, uuid=f"{pruning}"), image_part(fresh_url()), image_part(None, uuid=f"no {pruning}")
    error = refusal(server.post({**body, "messages": [user("Where is the dog?", *images)]}))
    check_named(error, "messages.0.content.2.image_url", "no image is cached under this uuid for this policy")


def test_an_image_that_is_cached_only_for_another_policy(server: Server) -> None:
    server.ask(messages=[user("Where?", image_part(fresh_url(), uuid="pruned"))], pruning={"method": "resprune"})
    error = refusal(server.post({"messages": [user("Where?", image_part(None, uuid="pruned"))], "pruning": False}))
    check_named(error, "messages.0.content.0.image_url", "no image is cached under this uuid for this policy")


STRANGE_IMAGES: dict[str, str] = {  # test_images.py has more, and what becomes of their pixels
    "1 x 1": url_of(Image.new("RGB", (1, 1), "red")),
    "10,000 x 20": url_of(Image.new("RGB", (10_000, 20), "red")),
    "20 x 10,000": url_of(Image.new("RGB", (20, 10_000), "red")),
    "grey, 16 bits": url_of(Image.fromarray(np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32))),
    "RGBA": url_of(fresh_picture().convert("RGBA")),
    "BMP announced as PNG": url_of(fresh_picture(), "BMP").replace("image/bmp", "image/png"),
}


@pytest.mark.parametrize("pruning", [{"budget": {"type": "tokens", "keep": 40}}, False], ids=["pruned", "unpruned"])
@pytest.mark.parametrize("url", STRANGE_IMAGES.values(), ids=STRANGE_IMAGES.keys())
def test_a_strange_image_is_answered(server: Server, url: str, pruning: object) -> None:
    answer = server.ask(messages=[user("Where is the dog?", url)], pruning=pruning)
    assert kept(answer) == [40 if pruning else VISUAL_TOKENS]
    assert answer["choices"][0]["message"]["content"]


# --- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"messages": ['],
    ids=["empty", "cut off", "list", "null", "text", "no UTF-8", "cut off later"],
)
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    refusal(server.post(body))


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", ["fast", False])
def test_embeddings_of_any_number_of_rows_are_taken(server: Server, pruning: object) -> None:
    def part(tensor: torch.Tensor) -> Body:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}

    rows = torch.randn(20, 256)  # as wide as the language model
    parts = [part(rows[:7]), part(rows.double()), part(rows[3:])]
    assert kept(server.ask(messages=[user("Compare them.", *parts)], pruning=pruning)) == [7, 20, 17]


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pruning": {"alpha": -1}}, "policy"),
        ({"model": "llava@blanced"}, "policy"),
        ({"mm_processor_kwargs": {"pruning": "fast"}}, "policy"),
        ({"messages": [user("Where?", {"type": "text", "text": "Hello.", "pruning": "fast"})]}, "policy"),
        ({"messages": [user("Where?", fresh_url(), "nonsense")]}, "image"),
    ],
    ids=["a policy", "an alias", "processor options", "a policy of a text", "an image"],
)
def test_a_refusal_is_counted_by_its_reason_and_its_images_are_not(server: Server, fields: Body, reason: str) -> None:
    counters = f"errors_total|reason={reason}", "errors_total", "requests_total|outcome=refused", "visual_tokens_total"
    before = server.metrics()
    assert server.post({"messages": [user("Where?", fresh_url())], **fields}).status_code in (400, 404)
    assert server.metrics().since(before, *(f"vtprune:{name}" for name in counters)) == (1, 1, 1, 0)

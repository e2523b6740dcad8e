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
from PIL import ExifTags, Image

from tests.support.chat import (
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
from vllm_vtprune_checkpoints import tiny_checkpoint

pytestmark = pytest.mark.engine

MAX_ANSWER = 2048  # bytes


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
    assert len(response.content) < MAX_ANSWER
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

# pruning field, where the mistake is below it, the value as shown, what is accepted
BAD_POLICIES: dict[str, tuple[object, str, str, str]] = {
    "unknown key": ({"metod": "resprune"}, "metod", "(did you mean method?)", "one of method, budget"),
    "unknown key of the budget": ({"budget": {"keeep": 3}}, "budget.keeep", "unknown field", "one of type, threshold"),
    "unknown method": ({"method": "magic"}, "method", '"magic"', "one of none, resprune"),
    "method of another type": ({"method": 7}, "method", "7", "one of none, resprune"),
    "unknown preset": ("blanced", "", '"blanced" is not accepted (did you mean balanced?)', "a preset: off, "),
    "misspelt method": ({"method": "resprun"}, "method", "(did you mean resprune?)", "one of none, resprune"),
    "true": (True, "", "true", "an object, false, or a preset"),
    "a number": (3, "", "3", "an object, false, or a preset"),
    "a list": ([], "", "[]", "an object, false, or a preset"),
    "keep = 0": ({"budget": {"type": "tokens", "keep": 0}}, "budget.keep", "0", "an integer from 1"),
    "keep < 0": ({"budget": {"type": "tokens", "keep": -5}}, "budget.keep", "-5", "an integer from 1"),
    "keep = true": ({"budget": {"type": "tokens", "keep": True}}, "budget.keep", "true", "an integer from 1"),
    "keep as text": ({"budget": {"type": "tokens", "keep": "64"}}, "budget.keep", '"64"', "an integer from 1"),
    "keep is a share": ({"budget": {"type": "tokens", "keep": 0.5}}, "budget.keep", "0.5", "an integer from 1"),
    "share above 1": ({"budget": {"type": "ratio", "keep": 1.5}}, "budget.keep", "1.5", "at most 1"),
    "share of 0": ({"budget": {"type": "ratio", "keep": 0}}, "budget.keep", "0", "above 0"),
    "keep is missing": ({"budget": {"type": "tokens"}}, "budget.keep", "nothing given", "an integer from 1"),
    "threshold 1.5": ({"budget": {"threshold": 1.5}}, "budget.threshold", "1.5", "above 0 and at most 1"),
    "threshold NaN": ({"budget": {"threshold": float("nan")}}, "budget.threshold", "NaN", "above 0 and at most 1"),
    "infinite alpha": ({"alpha": float("inf")}, "alpha", "Infinity", "null or a number from 0"),
    "unknown budget type": ({"budget": {"type": "all"}}, "budget.type", '"all"', "energy, ratio, tokens"),
    "budget is a number": ({"budget": 64}, "budget", "64", "an object whose type is"),
    "misspelt preset": ({"prest": "fast"}, "prest", "did you mean preset?", "preset, return_kept"),
    "key of another budget": (
        {"budget": {"type": "tokens", "rank": 9}},
        "budget.rank",
        "rank belongs to budget type energy",
        "one of scope, min_tokens, type, keep",
    ),
    "min > max": ({"budget": {"min_tokens": 64, "max_tokens": 32}}, "budget.min_tokens", "64", "which is 32"),
    "max < the default min": ({"budget": {"max_tokens": 8}}, "budget.max_tokens", "8", "whose default is 32"),
    "not used by the method": ({"method": "uniform", "alpha": 0.2}, "alpha", "0.2", "beside this method"),
    "policy beside none": ({"method": "none", "alpha": 0.2}, "alpha", "0.2", "nothing else"),
    "scope": ({"text": {"scope": "all"}}, "text.scope", '"all"', '"message" or "last_turn"'),
    "query is a list": ({"text": {"query": ["dog"]}}, "text.query", "['dog']", "null or a string"),
    "query too long": ({"text": {"query": "x" * 5000}}, "text.query", "xxx...", "at most 4096 characters"),
    "seed too large": ({"seed": 10**400}, "seed", "1000", "an integer from 0"),
    "long value": ({"method": "x" * 100_000}, "method", "xxx...", "one of none, resprune"),
    "long preset": ("x" * 100_000, "", "xxx...", "a preset"),
    "deep value": ({"budget": json.loads("[" * 60 + "]" * 60)}, "budget", "[[", "an object whose type is"),
    "half a character": ({"method": "\ud800"}, "method", '"\\ud800"', "one of none, resprune"),
}


@pytest.mark.parametrize(("pruning", "path", "shown", "accepted"), BAD_POLICIES.values(), ids=BAD_POLICIES.keys())
def test_a_policy_that_cannot_be_used(server: Server, pruning: object, path: str, shown: str, accepted: str) -> None:
    message = user("Where is the dog?", fresh_url())
    error = refusal(server.post({"messages": [message], "pruning": pruning}))
    check_named(error, ".".join(filter(None, ["pruning", path])), shown, accepted)


@pytest.mark.parametrize("case", ["unknown key", "unknown preset", "keep = 0", "threshold NaN", "min > max"])
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


def test_a_long_or_strange_key_is_cut_and_made_printable(server: Server) -> None:
    for key, shown in (("x" * 100_000, "x" * 64), ("\ud800", "\\ud800"), ("a\nb", "a\\nb")):
        error = refusal(server.post({"messages": [user("Where?", fresh_url())], "pruning": {key: 1}}))
        check_named(error, f"pruning.{shown}", "unknown field")


def test_a_wrong_policy_without_any_image_is_wrong_too(server: Server) -> None:
    error = refusal(server.post({"messages": [user("Where is the dog?")], "pruning": {"alpha": -1}}))
    check_named(error, "pruning.alpha", "-1")


def test_a_stream_is_refused_before_it_begins(server: Server) -> None:
    bad_policy = {"messages": [user("Where?", fresh_url())], "pruning": {"alpha": -1}, "stream": True}
    check_named(refusal(server.post(bad_policy)), "pruning.alpha", "-1")
    bad_image = {"messages": [user("Where?", "data:image/png;base64,@")], "stream": True}
    check_named(refusal(server.post(bad_image)), "messages.0.content.0.image_url", "base64")


@pytest.mark.parametrize("value", ["fast", False, None, {"method": "uniform"}])
def test_vllm_s_own_field_for_such_options_is_no_way_in(server: Server, value: object) -> None:
    message = user("Where is the dog?", fresh_url())
    error = refusal(server.post({"messages": [message], "mm_processor_kwargs": {"pruning": value}}))
    assert error["param"] == "mm_processor_kwargs.pruning"
    assert "misplaced policy; expected it in the field pruning" in error["message"]


def test_other_processor_options_stay_refused_beside_a_policy(server: Server) -> None:
    """That our own pass does not mean that a client's do."""
    body = {"messages": [user("Where?", fresh_url())], "pruning": "fast", "mm_processor_kwargs": {"do_resize": False}}
    error = refusal(server.post(body))
    assert error["param"] == "mm_processor_kwargs"


# --- images ---------------------------------------------------------------------------------------------------------


def cut_in_half(format: str) -> str:
    buffer = io.BytesIO()
    fresh_picture().resize((300, 300)).save(buffer, format)
    return url_of_bytes(buffer.getvalue()[: buffer.tell() // 2], format)


def damaged(format: str) -> str:
    buffer = io.BytesIO()
    fresh_picture().save(buffer, format)
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 255
    return url_of_bytes(bytes(data), format)


BAD_URLS: dict[str, tuple[str, str]] = {
    "broken base64": ("data:image/png;base64,@@@@", "does not hold valid base64"),
    "base64 cut off": (fresh_url()[:-3], "does not hold valid base64"),
    "half a character": ("data:image/png;base64,\ud800", "does not hold valid base64"),
    "no base64": ("data:image/png,abc", "is not a base64 data URL"),
    "no data": ("data:image/png;base64,", "is not an image in a known format (0 bytes)"),
    "PNG cut off": (cut_in_half("PNG"), "holds an image that cannot be decoded (truncated)"),
    "JPEG cut off": (cut_in_half("JPEG"), "holds an image that cannot be decoded (truncated)"),
    "damaged PNG": (damaged("PNG"), "holds an image that cannot be decoded (truncated, damaged or "),
    "no image": (url_of_bytes(b"hello world"), "is not an image in a known format (11 bytes)"),
    "PNG signature alone": (
        url_of_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
        "is not an image in a known format (48 bytes)",
    ),
    "no URL": ("nonsense", "'nonsense' is not a URL"),
    "empty": ("", "'' is not a URL"),
}
OVER_A_LIMIT: dict[str, tuple[Callable[[], str], str, str]] = {
    "unpacks to 900 megapixels": (
        lambda: url_of(Image.new("1", (30_000, 30_000))),
        "has far too many pixels",
        "at most 100 megapixels",
    ),
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
    "an upright line": (
        lambda: url_of(Image.new("RGB", (1, 513))),
        "has 1 x 513 pixels",
        "a longer side of at most 512 times the shorter",
    ),
    "33 MiB": (lambda: url_of_bytes(b"\0" * (33 * 2**20)), "is too large", "at most 32 MiB"),
}
NOT_LOADED: dict[str, tuple[str, str]] = {
    "web": ("http://example.com/cat.png", "is on the web"),
    "web, secure": ("https://example.com/cat.png", "is on the web"),
    "this machine": ("http://127.0.0.1:1/cat.png", "is on the web"),
    "a file": ("file:///etc/passwd", "is a local file"),
    "a file by another name": ("FILE://localhost/etc/passwd", "is a local file"),
    "another scheme": ("ftp://example.com/cat.png", "is not a URL of an image"),
    "a script": ("javascript:alert(1)", "is not a URL of an image"),
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


@pytest.mark.parametrize(("url", "problem"), NOT_LOADED.values(), ids=NOT_LOADED.keys())
def test_an_image_that_is_not_sent_along(server: Server, url: str, problem: str) -> None:
    error = refusal(server.post({"messages": [user("Where is the dog?", url)]}))
    check_named(error, "messages.0.content.0.image_url", problem, "data:image/<format>;base64,")


def test_a_uuid_that_nobody_showed_an_image_for(server: Server) -> None:
    error = refusal(server.post({"messages": [user("Where is the dog?", image_part(None, uuid="never-seen"))]}))
    check_named(error, "messages.0.content.0.image_url", "no image is cached under this uuid")


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


def test_more_images_than_allowed(server: Server) -> None:
    error = refusal(server.post({"messages": [user("Compare.", *[fresh_url() for _ in range(4)])]}))
    assert "too many images; expected at most 3" in error["message"]


TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6

STRANGE_IMAGES: dict[str, str] = {
    "1 x 1": url_of(Image.new("RGB", (1, 1), "red")),
    "10,000 x 20": url_of(Image.new("RGB", (10_000, 20), "red")),
    "20 x 10,000": url_of(Image.new("RGB", (20, 10_000), "red")),
    "black and white": url_of(fresh_picture().convert("1")),
    "grey": url_of(fresh_picture().convert("L")),
    "grey and alpha": url_of(fresh_picture().convert("LA")),
    "grey, 16 bits": url_of(Image.fromarray(np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32))),
    "palette": url_of(fresh_picture().convert("P")),
    "palette, transparent": url_of(fresh_picture().convert("P"), transparency=0),
    "RGBA": url_of(fresh_picture().convert("RGBA")),
    "CMYK": url_of(fresh_picture().convert("CMYK"), "JPEG"),
    "floating point": url_of(Image.fromarray(np.linspace(0, 1, 900, dtype=np.float32).reshape(30, 30)), "TIFF"),
    "turned by EXIF": url_of(fresh_picture(), "JPEG", exif=TURNED),
    "animated": url_of(fresh_picture(), "GIF", save_all=True, append_images=[fresh_picture()]),
    "WebP": url_of(fresh_picture(), "WEBP"),
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


def test_a_body_too_deep_to_be_read(server: Server) -> None:
    refusal(server.post(b"[" * 100_000))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": None},
        {"messages": "Where is the dog?"},
        {"messages": []},
        {"messages": [5]},
        {"messages": [{"content": "Where is the dog?"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [5]}]},
        {"messages": [{"role": "user", "content": [None]}]},
        {"messages": [{"role": "user", "content": [{}]}]},
        {"messages": [{"role": "user", "content": [{"type": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": ["image_url"]}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": None}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": "Where?"}], "max_tokens": -1},
        {"messages": [{"role": "user", "content": "dog " * 3000}]},
        {"messages": [{"role": "user", "content": "Where?"}], "mm_processor_kwargs": 5},
    ],
    ids=lambda fields: json.dumps(fields)[:100],
)
@pytest.mark.parametrize("pruning", ["fast", False])
def test_a_request_that_is_wrong_elsewhere(server: Server, fields: Body, pruning: object) -> None:
    refusal(server.post({**fields, "pruning": pruning}))


def test_a_model_that_is_not_served(server: Server) -> None:
    response = server.post({"model": "another", "messages": [user("Where?", fresh_url())], "pruning": "fast"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"


# --- what would take an image's place, or end the engine ------------------------------------------------------------


def test_a_misspelt_field_is_named(server: Server) -> None:
    for key in ("prunning", "prune", "pruning_policy"):
        error = refusal(server.post({"messages": [user("Where?", fresh_url())], key: "fast"}))
        check_named(error, key, "did you mean pruning?")
        part = image_part(fresh_url(), **{key: "fast"})
        check_named(refusal(server.post({"messages": [user("Where?", part)]})), f"messages.0.content.0.{key}")


@pytest.mark.parametrize("part", [{"type": "image_url"}, {"type": "input_image"}, {}], ids=json.dumps)
def test_a_url_that_stands_in_no_object_is_read(server: Server, part: Body) -> None:
    url = fresh_url()
    plain = server.ask(messages=[user("Where?", url)], pruning="fast")
    assert kept(server.ask(messages=[user("Where?", {**part, "image_url": url})], pruning="fast")) == kept(plain)
    error = refusal(server.post({"messages": [user("Where?", {**part, "image_url": "nonsense"})]}))
    check_named(error, "messages.0.content.0.image_url", "'nonsense' is not a URL")


def test_a_text_that_takes_an_image_s_place_is_refused_beside_images_alone(server: Server) -> None:
    error = refusal(server.post({"messages": [user("<image> or <image>?", fresh_url())]}))
    check_named(error, "messages.0.content.1.text", "'<image>'")
    answer = server.ask(messages=[{"role": "user", "content": "What does <image><image> mean in HTML?"}])
    assert answer["choices"][0]["message"]["content"]


def test_a_prompt_is_not_cut_within_an_image(server: Server) -> None:
    body = {"messages": [user("Where is the dog?", fresh_url())], "truncate_prompt_tokens": 4, "pruning": "fast"}
    assert refusal(server.post(body))["param"] == "truncate_prompt_tokens"


def test_embeddings_of_any_number_of_rows_are_taken_and_no_other_form(server: Server) -> None:
    def part(tensor: torch.Tensor) -> Body:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}

    rows = torch.randn(20, tiny_width())
    for pruning in (False, "fast"):
        parts = [part(rows[:7]), part(rows.double()), part(rows[3:])]
        answer = server.ask(messages=[user("Compare them.", *parts)], pruning=pruning)
        assert kept(answer) == [7, 20, 17]
        for wrong in (rows[:0], rows[:, 1:], rows / 0, rows.int(), rows[0]):
            error = refusal(server.post({"messages": [user("Where?", part(rows), part(wrong))], "pruning": pruning}))
            check_named(error, "messages.0.content.1.image_embeds")


def tiny_width() -> int:
    config = json.loads((tiny_checkpoint() / "config.json").read_text())
    return int(config["text_config"]["hidden_size"])


# --- metrics --------------------------------------------------------------------------------------------------------


def test_refusals_are_counted_and_images_of_theirs_are_not(server: Server) -> None:
    keys = [f"vtprune:errors_total|reason={reason}" for reason in ("policy", "image")]
    before = server.metrics()
    refusal(server.post({"messages": [user("Where?", fresh_url())], "pruning": "blanced"}))
    assert server.metrics().since(before, *keys, "vtprune:visual_tokens_total") == (1, 0, 0)
    refusal(server.post({"messages": [user("Where?", fresh_url(), "nonsense")]}))
    assert server.metrics().since(before, *keys, "vtprune:visual_tokens_total") == (1, 1, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"pruning": {"alpha": -1}},
        {"model": "llava@blanced"},
        {"mm_processor_kwargs": {"pruning": "fast"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Where?", "pruning": "fast"}]}]},
    ],
    ids=json.dumps,
)
def test_a_policy_is_counted_wherever_it_was_refused(server: Server, fields: Body) -> None:
    keys = ["vtprune:errors_total|reason=policy", "vtprune:errors_total", "vtprune:requests_total|outcome=refused"]
    before = server.metrics()
    assert server.post({"messages": [user("Where?", fresh_url())], **fields}).status_code in (400, 404)
    assert server.metrics().since(before, *keys) == (1, 1, 1)

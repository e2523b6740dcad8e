"""What the model that is served cannot take is refused at its path, in plain English, before any engine sees it."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.chat import image_part, leaks, url_of, user
from tests.support.foreign import write_foreign_checkpoint
from tests.support.rendering import Endpoint, endpoint
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.qwen2_5_vl import write_qwen2_5_vl_checkpoint

WRITE: dict[str, Callable[[Path], Path]] = {
    "llava": lambda folder: tiny_checkpoint(),
    "qwen2_5_vl": write_qwen2_5_vl_checkpoint,
    "internvl": lambda folder: write_internvl_checkpoint(folder, image_size=112),
    "foreign": write_foreign_checkpoint,
}
TOKENS = {  # special ones; each stands for media or around them
    "llava": ["<image>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_end|>", "<|vision_start|>"],
    "internvl": ["</img>", "<IMG_CONTEXT>", "<img>"],
    "foreign": ["<|image_pad|>", "<|video_pad|>", "<|vision_end|>", "<|vision_start|>"],
}
OFF: dict[str, Any] = {"pruning": False}
URL = url_of(Image.effect_noise((48, 48), 90).convert("RGB"))
TEXT = {"type": "text", "text": "Where?"}
WIDTH = 256  # of the language models of these checkpoints

# What of the inside of the server no client is shown.
INSIDE = re.compile(r"ChatCompletion|Param\b|Processor|Traceback|pydantic|<PIL|tensor\(|NoneType|\bdict\b|TypedDict")


@pytest.fixture(scope="module", params=WRITE)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def served(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Embeddings and options for the image processor are allowed, as operators may."""
    checkpoint = WRITE[family](tmp_path_factory.mktemp(family))
    options: dict[str, Any] = {"limit_mm_per_prompt": {"image": 2, "video": 1}, "enable_mm_embeds": True}
    if family == "llava":
        del options["limit_mm_per_prompt"]["video"]
    with endpoint(checkpoint, default=False, trust_request_mm_kwargs=True, **options) as instance:
        yield instance


@pytest.fixture(scope="module")
def closed() -> Iterator[Endpoint]:
    """With the settings that `vllm serve` has on its own."""
    with endpoint(tiny_checkpoint()) as instance:
        yield instance


def asked(*parts: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, TEXT]}], **OFF, **fields}


def saved(tensor: torch.Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def embeds(value: Any) -> dict[str, Any]:
    return {"type": "image_embeds", "image_embeds": value}


def grid_of(rows: torch.Tensor, grid: Any) -> dict[str, Any]:
    return embeds({"image_embeds": saved(rows), "image_grid_thw": grid})


# --- text that looks like an image ----------------------------------------------------------------------------------


def test_a_token_that_stands_for_media_is_refused_beside_them_wherever_it_is(served: Endpoint, family: str) -> None:
    picture = user("Where?", URL)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for token in TOKENS[family]:
        text = f"a {token} b"
        arguments = json.dumps({"a": text}, ensure_ascii=False)
        for path, messages in {
            "messages.0.content.1.text": [user(text, URL)],
            "messages.0.content": [{"role": "system", "content": text}, picture],
            "messages.1.content": [picture, {"role": "assistant", "content": text}, user("Why?")],
            "messages.2.content.0.text": [picture, {"role": "assistant", "content": "There."}, user(text)],
            "messages.0.tool_calls.0.function.arguments": [
                {"role": "assistant", "tool_calls": [{**call, "function": {"name": "f", "arguments": arguments}}]},
                picture,
            ],
            "messages.1.content.0.text": [
                picture,
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": text}]},
            ],
        }.items():
            error = served.error({"messages": messages, **OFF})
            assert error["param"] == path
            assert repr(token) in error["message"]
        halves = [{"type": "text", "text": half} for half in (token[:3], token[3:])]
        assert served.error(asked(image_part(URL), *halves))["param"] == "messages.0.content"
        tool = {"type": "function", "function": {"name": "f", "description": text}}
        error = served.error(asked(image_part(URL), tools=[tool], tool_choice="none"))
        assert error["param"] == "tools.0.function.description"
        assert served.post({"messages": [user(text)], **OFF}).status_code == 200, "a question about the token itself"


def test_other_brackets_are_text(served: Endpoint) -> None:
    text = "<b>image</b> [img] <a href='/img'> <|im_age|>"
    assert served.post(asked(image_part(URL), {"type": "text", "text": text})).status_code == 200


# --- images that a model does not take ------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", ["fast", False, {"method": "resize", "budget": {"type": "tokens", "keep": 9}}])
def test_a_line_is_refused_by_its_path_or_taken(served: Endpoint, family: str, pruning: Any) -> None:
    line = image_part(url_of(Image.new("RGB", (4020, 20), "red")))
    response = served.post(asked(image_part(URL), line, pruning=pruning))
    if family == "qwen2_5_vl":
        error = response.json()["error"]
        assert error["param"] == "messages.0.content.1.image_url"
        assert "has 4020 x 20 pixels" in error["message"]
        assert "aspect ratio must be smaller than 200" in error["message"]
    elif family == "foreign":  # vLLM's own processor does not say which image it was
        assert "aspect ratio must be smaller than 200" in response.json()["error"]["message"]
    elif isinstance(pruning, dict):
        assert response.json()["error"]["param"] == "pruning.method"
    else:
        assert response.status_code == 200, response.text
    assert not INSIDE.search(response.text)


def test_a_prompt_that_is_cut_within_an_image_is_refused(served: Endpoint) -> None:
    for limit in (1, 8):
        assert served.error(asked(image_part(URL), truncate_prompt_tokens=limit))["param"] == "truncate_prompt_tokens"
    assert served.post(asked(image_part(URL), truncate_prompt_tokens=1500)).status_code == 200
    assert served.post(asked(truncate_prompt_tokens=1)).status_code == 200, "no image"


def test_one_image_too_many_is_the_one_that_is_named(served: Endpoint) -> None:
    error = served.error({"messages": [user("Where?", URL), user("Here?", URL, URL)], **OFF})
    assert error["param"] == "messages.1.content.1.image_url"
    assert "too many images; expected at most 2" in error["message"]


# --- embeddings -----------------------------------------------------------------------------------------------------

ROWS = torch.randn(10, WIDTH)
BAD_EMBEDDINGS = {
    "no rows": saved(ROWS[:0]),
    "too many rows": saved(torch.zeros(3000, WIDTH)),
    "too wide": saved(torch.randn(10, WIDTH + 1)),
    "not a number": saved(ROWS / 0 * 0),
    "infinite": saved(ROWS / 0),
    "integers": saved(torch.ones(10, WIDTH, dtype=torch.int64)),
    "complex": saved(torch.ones(10, WIDTH, dtype=torch.complex64)),
    "one row": saved(ROWS[0]),
    "a number": saved(ROWS[0, 0]),
    "two images": saved(torch.stack([ROWS, ROWS])),
    "no base64": "@@",
    "no tensor": "AAAA",
    "a pickle": base64.b64encode(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.").decode(),
    "an integer": 5,
    "null": None,
    "a list": [ROWS[0].tolist()],
    "no grid": {"image_embeds": saved(ROWS)},
    "with a gradient": saved(ROWS.clone().requires_grad_()),
    "with a pending operation": saved(torch.complex(ROWS, ROWS).conj().imag),
    "without values": saved(ROWS.to("meta")),
    "in 8 bits": saved(ROWS.to(torch.float8_e4m3fn)),
    "too large for float32": saved(ROWS.double() * 0 + 1e300),
}
GRID = [1, 4, 4]  # of which four patches each are a token
BAD_GRIDS: dict[str, tuple[torch.Tensor, Any, str]] = {
    "another number of rows": (ROWS[:5], GRID, "image_embeds"),
    "no rows": (ROWS[:0], [0, 4, 4], "image_embeds"),
    "negative": (ROWS[:4], [-1, -4, 4], "image_grid_thw"),
    "odd": (ROWS[:4], [1, 3, 6], "image_grid_thw"),
    "huge": (ROWS[:4], [1, 400_000, 600_000], "image_embeds"),
    "fractions": (ROWS[:4], [1.0, 4.0, 4.0], "image_grid_thw"),
    "two": (ROWS[:4], saved(torch.tensor([GRID, GRID])), "image_grid_thw"),
    "one number": (ROWS[:4], saved(torch.tensor(4)), "image_grid_thw"),
    "not a number": (ROWS[:4] / 0 * 0, GRID, "image_embeds"),
    "too wide": (torch.zeros(4, WIDTH + 1), GRID, "image_embeds"),
}


@pytest.mark.parametrize("value", BAD_EMBEDDINGS.values(), ids=BAD_EMBEDDINGS.keys())
def test_embeddings_that_the_engine_would_not_survive_are_refused(served: Endpoint, value: Any) -> None:
    for pruning in (False, "fast"):
        error = served.error(asked(embeds(value), pruning=pruning))
        assert error["param"] == "messages.0.content.0.image_embeds"
        assert not INSIDE.search(error["message"]), error["message"]


def test_embeddings_with_a_wrong_grid_are_refused(served: Endpoint, family: str) -> None:
    for name, (rows, grid, key) in BAD_GRIDS.items():
        error = served.error(asked(grid_of(rows, grid)))
        at = "messages.0.content.0.image_embeds"
        assert error["param"] == (f"{at}.{key}" if family in ("qwen2_5_vl", "foreign") else at), name


def test_embeddings_in_order_pass(served: Endpoint, family: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, ROWS.numpy())
    if family in ("qwen2_5_vl", "foreign"):
        good = [grid_of(ROWS[:4], GRID), grid_of(ROWS[:6], saved(torch.tensor([1, 4, 6])))]
    else:
        good = [embeds(saved(ROWS)), embeds(base64.b64encode(buffer.getvalue()).decode())]
    answer = served.post(asked(*good, pruning="fast"))
    assert answer.status_code == 200, answer.text
    assert [image["bypass_reason"] for image in answer.json()["pruning"]["images"]] == (
        ["unsupported_model" if family == "foreign" else "unsupported_modality"] * 2
    )
    error = served.error(asked(good[0], image_part(URL)))
    assert error["param"] == "image_embeds", "vLLM's own"


def test_embeddings_are_refused_where_they_are_not_allowed(closed: Endpoint) -> None:
    error = closed.error(asked(embeds(saved(ROWS))))
    assert error["param"] == "messages.0.content.0.image_embeds"
    assert "--enable-mm-embeds" in error["message"]


# --- options of the image processor ---------------------------------------------------------------------------------

SHAPES = (
    "crop_size", "data_format", "device", "do_center_crop", "image_grid_pinpoints", "merge_size", "no_such_option",
    "patch_size", "return_tensors", "temporal_patch_size", "text_kwargs", "tokens_per_tile",
)  # fmt: skip
SIZES = {
    "llava": {},
    "qwen2_5_vl": {"min_pixels": 28 * 28 * 20, "size": {"shortest_edge": 784, "longest_edge": 10**6}},
    "internvl": {"max_patches": 2},
}


@pytest.mark.parametrize("family", SIZES, indirect=True)  # which options a foreign engine survives is not known
def test_options_that_change_shapes_are_refused(served: Endpoint, family: str) -> None:
    for pruning in (False, "fast"):
        for name in SHAPES:
            error = served.error(asked(image_part(URL), mm_processor_kwargs={name: 7}, pruning=pruning))
            assert error["param"] == f"mm_processor_kwargs.{name}"
        error = served.error(asked(image_part(URL), mm_processor_kwargs={"images_kwargs": {"patch_size": 7}}))
        assert error["param"] == "mm_processor_kwargs.images_kwargs.patch_size"
        for name, value in {**SIZES[family], "do_rescale": True}.items():
            allowed = asked(image_part(URL), mm_processor_kwargs={name: value}, pruning=pruning)
            assert served.post(allowed).status_code == 200, name
        for values in ({"image_mean": [1]}, {"image_std": "x"}):
            error = served.error(asked(image_part(URL), mm_processor_kwargs=values, pruning=pruning))
            assert error["param"] == "mm_processor_kwargs"
            assert not INSIDE.search(error["message"])


# --- whatever else --------------------------------------------------------------------------------------------------

CUSTOM = {"name": "f", "input": "x"}
# A body, and the path of what is wrong in it; None where vLLM says it, which names no field.
MISTAKES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no messages": ({"messages": []}, None),
    "too long": ({"messages": [user("dog " * 3000)]}, None),
    "audio": (asked({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}), "0.input_audio"),
    "audio by URL": (asked({"type": "audio_url", "audio_url": "data:audio/wav;base64,AAAA"}), "0.audio_url"),
    "prompt embeddings": (asked({"type": "prompt_embeds", "data": "x"}), None),
    "video": (asked({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}), "0.video_url"),
    "another tool": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": CUSTOM}]}]},
        None,
    ),
    "half a tool": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f"}}]}]},
        "messages.0.tool_calls.0.custom.input",
    ),
    "tool choice": (asked(tools=[{"type": "function", "function": {"name": "f"}}]), None),
    "chat template": (asked(chat_template="{{ x.y.z }}"), None),
    "n": (asked(n=-1), None),
    "n, far too large": (asked(n=10**9), None),
    "temperature": (asked(temperature=-1), "temperature"),
    "max_tokens": (asked(max_tokens=10**6), "max_tokens"),
    "min_tokens": (asked(min_tokens=10), None),
    "stop": (asked(stop=[""]), None),
    "bad_words": (asked(bad_words=[""]), None),
    "top_k": (asked(top_k=-5), None),
    "min_p": (asked(min_p=7), None),
    "presence_penalty": (asked(presence_penalty=9), None),
    "repetition_penalty": (asked(repetition_penalty=-1), None),
    "two constraints": (asked(structured_outputs={"regex": "a", "choice": ["b"]}), None),
    "both at the end": (asked(continue_final_message=True), None),
    "a response format": (asked(response_format={"type": "json_schema"}), "response_format"),
}


@pytest.mark.parametrize(("body", "path"), MISTAKES.values(), ids=MISTAKES.keys())
def test_no_refusal_shows_anything_of_the_inside(served: Endpoint, body: Any, path: str | None) -> None:
    error = served.error(body)
    if path is not None:
        assert error["param"] == (f"messages.0.content.{path}" if path[0].isdigit() else path)
    assert not INSIDE.search(error["message"]), error["message"]
    assert leaks(error["message"]) == []

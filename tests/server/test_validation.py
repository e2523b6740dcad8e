"""A request that is wrong anywhere is told so in one short, readable sentence."""

import json
import re
from typing import Any, get_type_hints

import pytest
from fastapi.exceptions import RequestValidationError
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from pydantic import TypeAdapter, ValidationError
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import MM_PARSER_MAP

from vllm_vtprune_server.content import PART_TYPES, POLICY_KEYS, resembles_pruning
from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.validation import MAX_MESSAGE, MAX_PARAM, explain

USER = {"role": "user", "content": "Where is the dog?"}
TOOL = {"type": "function", "function": {"name": "look"}}
TYPES = f"one of {', '.join(PART_TYPES)}"
URL = "a URL, or an object with a url"


def body_of(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def refusal(body: Any) -> tuple[str, str | None]:
    """Message and param of the answer to a body that the route gets to see."""
    try:
        PruningChatCompletionRequest.model_validate(body)
    except ValidationError as invalid:
        located = [{**error, "loc": ("body", *error["loc"])} for error in invalid.errors()]
        answer = explain(RequestValidationError(located, body=body))
    except Exception as error:
        answer = explain(error)
    else:
        pytest.fail(f"accepted: {json.dumps(body)[:200]}")
    assert answer is not None
    assert answer.error.code == 400
    assert answer.error.type == "BadRequestError"
    assert not re.search(r"\bbody\.", answer.error.message)
    return answer.error.message, answer.error.param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: nothing given; expected a value."),
        ({"messages": None}, "messages: null is not accepted; expected a list of at least one message."),
        ({"messages": "Hello"}, "messages: 'Hello' is not accepted; expected a list of at least one message."),
        ({"messages": []}, "messages: [] is not accepted; expected a list of at least one message."),
        ({"messages": [USER, 5]}, "messages.1: 5 is not accepted; expected an object with a role and content."),
        ({"messages": [{"content": "Hello"}]}, "messages.0.role: nothing given; expected a value."),
        (
            {"messages": [{"role": "user", "content": True}]},
            "messages.0.content: true is not accepted; expected a string or a list of content parts.",
        ),
        (
            {"messages": [{"role": "user", "content": {"text": "Hello"}}]},
            "messages.0.content: {'text': 'Hello'} is not accepted; expected a string or a list of content parts.",
        ),
        ({"max_tokens": "many"}, "max_tokens: 'many' is not accepted; expected an integer."),
        ({"temperature": "hot"}, "temperature: 'hot' is not accepted; expected a number."),
        ({"n": [1]}, "n: [1] is not accepted; expected an integer."),
        ({"logprobs": "maybe"}, "logprobs: 'maybe' is not accepted; expected a boolean."),
        ({"stop": 5}, "stop: 5 is not accepted; expected a string or a list."),
        ({"stop": ["a", 5]}, "stop.1: 5 is not accepted; expected a string."),
        ({"logit_bias": {"7": "b"}}, "logit_bias.7: 'b' is not accepted; expected a number."),
        ({"response_format": 5}, "response_format: 5 is not accepted; expected an object."),
        (
            {"response_format": {"type": "json_schema", "json_schema": 5}},
            "response_format.json_schema: 5 is not accepted; expected an object.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "messages.0.content.0.text: '\\ud800' is not accepted; expected text without lone surrogates.",
        ),
        ({"tools": [TOOL, {"type": "x"}]}, "tools.1.type: 'x' is not accepted; expected 'function'."),
        (
            {"stream": True, "stream_options": {"include_usage": 5}},
            "stream_options.include_usage: 5 is not accepted; expected a boolean.",
        ),
        ({"structured_outputs": 5}, "structured_outputs: 5 is not accepted; expected an object."),
        ({"mm_processor_kwargs": 5}, "mm_processor_kwargs: 5 is not accepted; expected an object."),
        (
            {"mm_processor_kwargs": {"pruning": None}},
            "mm_processor_kwargs.pruning: misplaced policy; expected it in the field pruning.",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 5}]}]},
            "messages.0.tool_calls.0.id: 5 is not accepted; expected a string.",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": 5}]},
            "messages.1.tool_calls: 5 is not accepted; expected a list of calls.",
        ),
        (body_of("Hello"), "messages.0.content.0: 'Hello' is not accepted; expected an object with a type."),
        (body_of({"type": "text", "text": 5}), "messages.0.content.0.text: 5 is not accepted; expected a string."),
        (body_of({"type": "text"}), "messages.0.content.0.text: nothing given; expected a string."),
        (
            body_of({"type": "tool_reference", "name": None}),
            "messages.0.content.0.name: null is not accepted; expected a string.",
        ),
        (body_of({"type": "foo"}), f"messages.0.content.0.type: 'foo' is not accepted; expected {TYPES}."),
        (body_of({"type": "image_pil"}), f"messages.0.content.0.type: 'image_pil' is not accepted; expected {TYPES}."),
        (body_of({"type": 5}), f"messages.0.content.0.type: 5 is not accepted; expected {TYPES}."),
        (body_of({"type": ["text"]}), f"messages.0.content.0.type: ['text'] is not accepted; expected {TYPES}."),
        (body_of({}), f"messages.0.content.0.type: nothing given; expected {TYPES}."),
        (body_of({"type": "image_url"}), f"messages.0.content.0.image_url: nothing given; expected {URL}."),
        (
            body_of({"type": "image_url", "image_url": None}),
            f"messages.0.content.0.image_url: null is not accepted; expected {URL}.",
        ),
        (
            body_of({"type": "video_url", "video_url": {"url": 5}}),
            "messages.0.content.0.video_url.url: 5 is not accepted; expected a string.",
        ),
        (
            body_of({"type": "input_image", "file_id": "x"}),
            "messages.0.content.0.image_url: nothing given; expected a URL.",
        ),
        (
            body_of({"type": "image_url", "image_url": {"url": "data:", "detail": "best"}}),
            "messages.0.content.0.image_url.detail: 'best' is not accepted; expected one of low, high, auto, original.",
        ),
        (
            body_of({"type": "input_audio", "input_audio": "AAAA"}),
            "messages.0.content.0.input_audio: 'AAAA' is not accepted; expected an object with data and format.",
        ),
        (
            body_of({"type": "input_audio", "input_audio": {"data": 5, "format": "wav"}}),
            "messages.0.content.0.input_audio.data: 5 is not accepted; expected a string.",
        ),
        (
            body_of({"type": "image_embeds", "image_embeds": 5}),
            "messages.0.content.0.image_embeds: 5 is not accepted; expected a string, or an object of strings.",
        ),
        (
            body_of({"type": "image_url", "image_url": None, "uuid": ["a"]}),
            "messages.0.content.0.uuid: ['a'] is not accepted; expected a string.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello", "pruning": "fast"}]}]},
            "messages.0.content.0.pruning: misplaced policy; expected it beside image_url, in a content "
            "part that holds an image.",
        ),
        (
            {"messages": [USER, {"role": "user", "content": [{"image_url": {"url": "data:", "pruning": "fast"}}]}]},
            "messages.1.content.0.image_url.pruning: misplaced policy; expected it beside image_url, not inside.",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_the_field_the_value_and_what_is_accepted(body: dict[str, Any], message: str) -> None:
    text, param = refusal(body if "messages" in body or not body else {"messages": [USER], **body})
    assert text == message
    assert param == message.partition(":")[0]


def test_a_part_that_is_validated_later_is_told_by_its_own_name() -> None:
    with pytest.raises(ValidationError) as later:
        TypeAdapter(dict[str, dict[str, int]]).validate_python({"image_url": {"detail": "high"}})
    answer = explain(later.value)
    assert answer is not None
    assert answer.error.message == "image_url.detail: 'high' is not accepted; expected an integer."


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": "data:,x"},
        {"type": "input_image", "image_url": "data:,x"},
        {"type": "input_image", "image_url": {"url": "data:,x"}, "detail": "original"},
        {"image_url": "data:,x"},
        {"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}, "uuid": 7},
    ],
    ids=json.dumps,
)
def test_an_image_has_one_reading_in_whichever_form(part: dict[str, Any]) -> None:
    request = PruningChatCompletionRequest.model_validate(body_of({**part, "pruning": "fast"}))
    [image] = request.conversation.images
    assert (image.field, image.url, image.pruning) == ("messages.0.content.0.image_url", "data:,x", "fast")
    [taken] = request.messages[0]["content"]
    assert (taken["type"], taken["image_url"]["url"]) == ("image_url", "data:,x")


def test_the_types_of_content_parts_are_vllm_s() -> None:
    assert {*PART_TYPES, "image_pil"} == MM_PARSER_MAP.keys()


def test_a_video_in_a_string_is_read_like_one_in_an_object() -> None:
    request = PruningChatCompletionRequest.model_validate(body_of({"type": "video_url", "video_url": "data:,x"}))
    assert [(part.param, part.url) for part in request.conversation.other_media] == [
        ("messages.0.content.0.video_url", "data:,x")
    ]
    assert request.messages[0]["content"] == [{"type": "video_url", "video_url": {"url": "data:,x"}}]


# --- our field, nearly ----------------------------------------------------------------------------------------------

MISSPELT = [
    "prunning", "Pruning", "PRUNING", "prune", "pruned", "pruneing", "prunig", "pruing", "purning", "puning", "prunign",
    "pruning_policy", "pruningPolicy", "visual_pruning", "token-pruning", "vtprune", "prune_ratio", " pruning",
]  # fmt: skip


@pytest.mark.parametrize("key", MISSPELT)
def test_a_field_that_is_meant_to_be_ours_is_named(key: str) -> None:
    meant = "unknown field (did you mean pruning?); expected a field of the API."
    assert refusal({"messages": [USER], key: "fast"}) == (f"{key}: {meant}", key)
    image = {"type": "image_url", "image_url": {"url": "data:"}, key: "fast"}
    path = f"messages.0.content.0.{key}"
    assert refusal(body_of(image)) == (f"{path}: {meant}", path)
    inside = {"type": "image_url", "image_url": {"url": "data:", key: "fast"}}
    path = f"messages.0.content.0.image_url.{key}"
    assert refusal(body_of(inside))[1] == path


@pytest.mark.parametrize("key", ["pruning", "prunning"])
def test_our_field_where_it_would_not_be_read_is_named(key: str) -> None:
    text, param = refusal({"messages": [USER], "extra_body": {key: "fast"}})
    assert param == f"extra_body.{key}"
    assert "an argument of the openai client" in text
    assert refusal({"messages": [{**USER, key: "fast"}]})[1] == f"messages.0.{key}"
    assert refusal(body_of({"type": "text", "text": "Hello", key: "fast"}))[1] == f"messages.0.content.0.{key}"


@pytest.mark.parametrize("key", sorted(POLICY_KEYS))
def test_a_field_of_a_policy_beside_the_messages_is_named(key: str) -> None:
    expected = f"{key}: misplaced field of a policy; expected it inside pruning."
    assert refusal({"messages": [USER], key: "fast"}) == (expected, key)
    assert PruningChatCompletionRequest.model_validate({"messages": [USER], key: None})


def test_no_field_of_an_api_is_taken_for_ours() -> None:
    parameters = get_type_hints(CompletionCreateParamsNonStreaming)
    responses = get_type_hints(ResponseCreateParamsNonStreaming)
    others = ["prompt", "prompt_id", "provider", "plugins", "proxy", "priming", "printing", "planning", "pricing",
              "running", "tuning", "purpose", "private", "provider_options", "return_prompt", "punctuation",
              "parent_message_id", "guided_json", "guided_regex", "transforms", "runtime"]  # fmt: skip
    known = {*PruningChatCompletionRequest.model_fields, *parameters, *responses, *CompletionRequest.model_fields}
    assert len(known) > 100
    assert not known & POLICY_KEYS
    assert [key for key in [*known - {"pruning"}, *others] if resembles_pruning(key)] == []
    assert PruningChatCompletionRequest.model_validate(
        {"messages": [USER], **dict.fromkeys(others, 1), "extra_body": {"prompt": 1}}
    )


# --- errors of vLLM's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "cause", "detail"),
    [
        ("Failed to apply XProcessor on data={}", ValueError("ratio too large"), "ratio too large"),
        ("Failed to apply XProcessor on data={}", ValueError("in /usr/lib/x.py"), "no reason stated"),
        ("bad <PIL.Image.Image image mode=RGB>", None, "no reason stated"),
    ],
)
def test_the_inside_of_the_server_is_not_shown(message: str, cause: Exception | None, detail: str) -> None:
    error = ValueError(message)
    error.__cause__ = cause
    answer = explain(error)
    assert answer is not None
    assert answer.error.message == f"The model's processor rejects this request: {detail}"


def test_what_vllm_says_itself_stays_without_its_repetitions() -> None:
    text, param = refusal({"messages": [USER], "top_logprobs": -3, "logprobs": True})
    assert (text, param) == ("`top_logprobs` must be a positive value or -1.", "top_logprobs")


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": "x" * 10**6},
        {"stop": [5] * 10**5},
        {"logit_bias": {"x" * 10**6: "y" * 10**6}},
        {"tools": [{"type": "x" * 10**6}] * 50},
        {"messages": ["x" * 10**6]},
        {"messages": [{"role": "user", "content": [["x"] * 1000] * 100, "tool_calls": 5}], "n": {"a": "x" * 10**6}},
        {"seed": 10**5000},
        {"n": "\ud800" * 10**5},
    ],
    ids=lambda body: next(reversed(body)),
)
def test_a_large_mistake_is_told_briefly(body: dict[str, Any]) -> None:
    text, param = refusal({"messages": [USER], **body})
    assert 0 < len(text) <= MAX_MESSAGE
    assert len(param or "") <= MAX_PARAM
    (text + (param or "")).encode()


def test_an_error_that_repeats_a_large_value_is_cut() -> None:
    answer = explain(VLLMValidationError("no " + "x" * 10**6, parameter="y" * 10**6, value="z" * 10**6))
    assert answer is not None
    assert len(answer.error.message) == MAX_MESSAGE
    assert len(answer.error.param or "") == MAX_PARAM


def test_a_mistake_of_the_server_is_not_explained_away() -> None:
    assert explain(RuntimeError("the engine died")) is None
    assert explain(KeyError("x")) is None


def test_the_text_of_a_message_is_read_once_for_all_its_images() -> None:
    """Else the time for a message of many images grows with the square of their number."""
    parts = [{"type": "text", "text": "Where?"}, *({"type": "image_url", "image_url": {"url": "data:"}} for _ in "ab")]
    images = PruningChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": parts}]}
    ).conversation.images
    assert [image.message_text for image in images] == ["Where?", "Where?"]
    assert images[0].message_text is images[1].message_text

"""A request that is wrong anywhere is told so in one short, readable sentence."""

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from vllm.exceptions import VLLMValidationError

from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.validation import MAX_MESSAGE, MAX_PARAM, explain

USER = {"role": "user", "content": "Where is the dog?"}
TOOL = {"type": "function", "function": {"name": "look"}}


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
    assert "body." not in answer.error.message
    return answer.error.message, answer.error.param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: nothing given; expected a value."),
        ({"messages": None}, "messages: null is not accepted; expected a list of messages."),
        ({"messages": "Hello"}, "messages: 'Hello' is not accepted; expected a list of messages."),
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
            "messages.0.content.0.text: '\\ud800' is not accepted; expected whole characters, "
            "no halves of surrogate pairs.",
        ),
        ({"tools": [TOOL, {"type": "x"}]}, "tools.1.type: 'x' is not accepted; expected 'function'."),
        (
            {"stream": True, "stream_options": {"include_usage": 5}},
            "stream_options.include_usage: 5 is not accepted; expected a boolean.",
        ),
        ({"structured_outputs": 5}, "structured_outputs: 5 is not accepted; expected an object."),
        ({"mm_processor_kwargs": 5}, "mm_processor_kwargs: 5 is not accepted; expected an object."),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello", "pruning": "fast"}]}]},
            "messages.0.content.0.pruning: a policy that would not be read; expected it beside image_url, in a content "
            "part that holds an image.",
        ),
        (
            {"messages": [USER, {"role": "user", "content": [{"image_url": {"url": "data:", "pruning": "fast"}}]}]},
            "messages.1.content.0.image_url.pruning: a policy that would not be read; expected it beside image_url, "
            "not inside.",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_the_field_the_value_and_what_is_accepted(body: dict[str, Any], message: str) -> None:
    said, param = refusal(body if "messages" in body or not body else {"messages": [USER], **body})
    assert said == message
    assert param == message.partition(":")[0]


def test_a_part_that_is_validated_later_is_told_by_its_own_name() -> None:
    with pytest.raises(ValidationError) as later:
        TypeAdapter(dict[str, dict[str, int]]).validate_python({"image_url": {"detail": "high"}})
    answer = explain(later.value)
    assert answer is not None
    assert answer.error.message == "image_url.detail: 'high' is not accepted; expected an integer."


def test_what_has_no_path_is_told_without_one() -> None:
    said, param = refusal({"messages": [{"role": "assistant", "tool_calls": [{"id": 5}]}]})
    assert said.startswith("The body: a part of it is not accepted; expected a string")
    assert param is None


def test_what_vllm_says_itself_stays_without_its_repetitions() -> None:
    said, param = refusal({"messages": [USER], "top_logprobs": -3, "logprobs": True})
    assert (said, param) == ("`top_logprobs` must be a positive value or -1.", "top_logprobs")


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
    said, param = refusal({"messages": [USER], **body})
    assert 0 < len(said) <= MAX_MESSAGE
    assert len(param or "") <= MAX_PARAM
    (said + (param or "")).encode()


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
    images = PruningChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": parts}]}).images
    assert [image.message_text for image in images] == ["Where?", "Where?"]
    assert images[0].message_text is images[1].message_text

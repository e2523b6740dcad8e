"""Messages as clients write them: one form for what has one reading, and a path for what has none."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from openai.types.chat import ChatCompletionMessageToolCallUnionParam
from pydantic import TypeAdapter, ValidationError

from vllm_vtprune_server.validation import NOTHING, InvalidField, explain_validation, not_accepted

FIELD = "pruning"
URL_KEYS = ("image_url", "video_url", "audio_url")
PART_TYPES = (
    *("audio_embeds", "audio_url", "image_embeds", "image_url", "input_audio", "input_image", "input_text"),
    *("output_text", "prompt_embeds", "refusal", "text", "thinking", "tool_reference", "video_embeds", "video_url"),
)
"""Of the content parts that vLLM reads, those that JSON can hold."""

TEXT_KEYS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **{"refusal": "refusal", "thinking": "thinking", "tool_reference": "name"},
}
"""Type of a content part that is text -> the key of its text."""

EMBEDDINGS = {**{key: key for key in ("image_embeds", "video_embeds", "audio_embeds")}, "prompt_embeds": "data"}
"""Type of a content part that holds embeddings -> the key of them."""

DETAILS = ("auto", "low", "high")
WORD = re.compile(r"[A-Za-z][a-z]*")
LIKENESS = 0.85  # of difflib; 0.86 with two letters in the wrong order


def like_pruning(key: object) -> bool:
    """Whether a key is meant to be ``pruning``, misspelt or with another word beside it: no field of an API is."""
    if not isinstance(key, str) or len(key) > 64:
        return False
    words = [key, *WORD.findall(key)]
    return "prun" in key.casefold() or any(
        word[:1].casefold() == "p" and SequenceMatcher(None, word.casefold(), FIELD).ratio() >= LIKENESS
        for word in words
    )


def refuse_misspelt(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise for a field of a request that would be ignored, though it is meant to be ``pruning``.

    Args:
        body: of the request.
        known: its fields, which mean what they say.

    Raises:
        InvalidField: naming the field.
    """
    for key, value in body.items():
        if key not in known and like_pruning(key):
            raise _misspelt(key)
        if key == "extra_body" and isinstance(value, Mapping):
            _refuse_inside("extra_body", value, "it beside messages: extra_body is an argument of the openai client")


def refuse_misplaced(index: int, message: Mapping[str, Any], image_keys: Sequence[str | None]) -> None:
    """Raise for a ``pruning`` in a message that would not be read, or is misspelt.

    Args:
        index: of the message.
        message: as the client wrote it.
        image_keys: for each content part, the key under which it holds an image; None where it holds none.

    Raises:
        InvalidField: naming the field.
    """
    beside = "it beside image_url, in a content part that holds an image, or at the top level of the request"
    _refuse_inside(f"messages.{index}", message, beside)
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, Mapping):
            continue
        path = f"messages.{index}.content.{number}"
        key = image_keys[number]
        if key is None and part.get(FIELD) is None:
            part = {name: value for name, value in part.items() if name != FIELD}
        if key is None:
            _refuse_inside(path, part, "it beside image_url, in a content part that holds an image")
            continue
        for name in part:
            if name != FIELD and like_pruning(name):
                raise _misspelt(f"{path}.{name}")
        if isinstance(part.get(key), Mapping):
            _refuse_inside(f"{path}.{key}", part[key], f"it beside {key}, not inside")


def _refuse_inside(path: str, inner: Mapping[str, Any], accepted: str) -> None:
    for key in inner:
        if like_pruning(key):
            param = f"{path}.{key}"
            raise InvalidField(f"{param}: misplaced policy; expected {accepted}.", parameter=param)


def _misspelt(path: str) -> InvalidField:
    return InvalidField(f"{path}: unknown field (did you mean {FIELD}?); expected a field of the API.", parameter=path)


def in_one_form(message: Any) -> Any:
    """A message whose URLs stand in an object, as in OpenAI's API, where clients write them without.

    ``input_image``, the form of another API of OpenAI's, becomes ``image_url``.
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part_in_one_form(part) for part in content]}


def _part_in_one_form(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind == "input_image" and "image_url" in part:
        kind = "image_url"
    elif kind is None:
        kind = next((key for key in URL_KEYS if key in part), None)
    if kind not in URL_KEYS or kind not in part:
        return part
    value = part[kind]
    return {**part, "type": kind, kind: {"url": value} if isinstance(value, str) else value}


def check_parts(index: int, message: Mapping[str, Any]) -> None:
    """Refuse content parts that vLLM would refuse without saying where they stand.

    Args:
        index: of the message.
        message: in one form.

    Raises:
        InvalidField: naming the field, its value and what is accepted.
    """
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        path = f"messages.{index}.content.{number}"
        if not isinstance(part, Mapping):
            raise not_accepted(path, part, "an object with a type")
        for key, value, accepted in _wrong_in(part):
            raise not_accepted(f"{path}.{key}", value, accepted)


def _wrong_in(part: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """What is wrong in a content part: the key, its value, and what is accepted."""
    kind, uuid = part.get("type", NOTHING), part.get("uuid")
    if uuid is not None and (isinstance(uuid, bool) or not isinstance(uuid, str | int)):
        yield "uuid", uuid, "a string"
    if kind == "input_image":
        yield "image_url", part.get("image_url", NOTHING), "a URL"
    elif not isinstance(kind, str) or kind not in PART_TYPES:
        if kind is not NOTHING or not any(key in part for key in PART_TYPES):
            yield "type", kind, f"one of {', '.join(PART_TYPES)}"
    elif kind in TEXT_KEYS:
        key = TEXT_KEYS[kind]
        text = part.get(key, NOTHING)
        if not isinstance(text, str) and (text is not None or kind == "tool_reference"):
            yield key, text, "a string"
    elif kind in URL_KEYS:
        yield from _wrong_in_url(kind, part.get(kind, NOTHING), named=uuid is not None)
    elif kind in EMBEDDINGS:
        value = part.get(EMBEDDINGS[kind])
        if value is not None and not isinstance(value, str | Mapping):
            yield EMBEDDINGS[kind], value, "a string, or an object of strings"
    elif kind == "input_audio":
        sound = part.get(kind, NOTHING)
        if not isinstance(sound, Mapping):
            yield kind, sound, "an object with data and format"


def _wrong_in_url(key: str, value: object, *, named: bool) -> Iterator[tuple[str, object, str]]:
    if value is None and named:
        return
    if not isinstance(value, Mapping):
        yield key, value, "a URL, or an object with a url"
        return
    url = value.get("url", NOTHING)
    if not isinstance(url, str) and not (url is None and named):
        yield f"{key}.url", url, "a string"
    detail = value.get("detail", "auto")
    if key == "image_url" and detail not in DETAILS:
        yield f"{key}.detail", detail, f"one of {', '.join(DETAILS)} (without effect)"


TOOL_CALLS = TypeAdapter(list[ChatCompletionMessageToolCallUnionParam])


def check_tool_calls(index: int, message: Mapping[str, Any]) -> None:
    """Refuse calls of tools that vLLM refused: without saying where they stand, as it looks at them by themselves.

    Args:
        index: of the message.
        message: as the client wrote it.

    Raises:
        InvalidField: naming the field, its value and what is accepted.
    """
    calls = message.get("tool_calls")
    path = f"messages.{index}.tool_calls"
    if calls is not None and not isinstance(calls, list):
        raise not_accepted(path, calls, "a list of calls")
    try:
        TOOL_CALLS.validate_python(calls or [])
    except ValidationError as invalid:
        raise _located(invalid, ("messages", index, "tool_calls"), {"messages": [{}] * index + [message]}) from None


def _located(invalid: ValidationError, at: tuple[str | int, ...], body: Mapping[str, Any]) -> InvalidField:
    """What is wrong in a part of a body that was validated by itself."""
    message, param = explain_validation([{**error, "loc": (*at, *error["loc"])} for error in invalid.errors()], body)
    return InvalidField(message, parameter=param or ".".join(map(str, at)))


def read_at_once(messages: list[Any], body: Mapping[str, Any]) -> None:
    """Have the lists in validated messages validated now, where a mistake in them can be told by its path.

    Args:
        messages: of the request. Pydantic validates some of their lists one item after the other, when they are read;
            those are replaced.
        body: what was validated.

    Raises:
        InvalidField: naming the field, its value and what is accepted.
    """
    for index, message in enumerate(messages):
        for key, value in message.items() if isinstance(message, dict) else ():
            if not isinstance(value, Iterator):
                continue
            try:
                message[key] = list(value)
            except ValidationError as invalid:
                raise _located(invalid, ("messages", index, key), body) from None

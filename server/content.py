"""Normalise and check messages: one form for equivalent spellings, and an error with a path for the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from openai.types.chat import ChatCompletionMessageToolCallUnionParam
from pydantic import TypeAdapter, ValidationError

from vllm_vtprune.presets import DETAILS
from vllm_vtprune_server.validation import MISSING, InvalidField, Path, located, nested, not_accepted, refused

FIELD = "pruning"
URL_KEYS = ("image_url", "video_url", "audio_url")
PART_TYPES = (
    *("audio_embeds", "audio_url", "image_embeds", "image_url", "input_audio", "input_image", "input_text"),
    *("output_text", "prompt_embeds", "refusal", "text", "thinking", "tool_reference", "video_embeds", "video_url"),
)
"""Types of content parts that vLLM reads and JSON can hold."""

TEXT_KEYS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **{"refusal": "refusal", "thinking": "thinking", "tool_reference": "name"},
}
"""Type of a text part -> the key of its text."""

EMBEDDINGS = {**{key: key for key in ("image_embeds", "video_embeds", "audio_embeds")}, "prompt_embeds": "data"}
"""Type of an embeddings part -> the key of its data."""

OPTIONS = ("mm_processor_kwargs", "chat_template_kwargs", "vllm_xargs")
"""Fields of a request that hold options by name."""
POLICY_KEYS = frozenset({"budget", "preset", "return_kept"})
"""Keys of a policy that no API has at the top level of a request."""
WORD = re.compile(r"[A-Za-z][a-z]*")
LEAST_SIMILARITY = 0.85  # difflib's ratio; two swapped letters give 0.86


def resembles_pruning(key: object) -> bool:
    """Whether a key is probably a misspelt or prefixed ``pruning``; no field of the APIs matches."""
    if not isinstance(key, str) or len(key) > 64:
        return False
    words = [key, *WORD.findall(key)]
    return "prun" in key.casefold() or any(
        word[:1].casefold() == "p" and SequenceMatcher(None, word.casefold(), FIELD).ratio() >= LEAST_SIMILARITY
        for word in words
    )


def refuse_misspelt(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Reject a request field that would be ignored but is probably a misspelt ``pruning``, or one of its fields.

    Raises:
        InvalidField: names the field.
    """
    for key, value in body.items():
        if key not in known and resembles_pruning(key):
            raise misspelt(key)
        if key in POLICY_KEYS and key not in known and value is not None:
            raise refused(key, "misplaced field of a policy", f"it inside {FIELD}")
        if key == "extra_body" and isinstance(value, Mapping):
            _refuse_inside("extra_body", value, "it beside messages: extra_body is an argument of the openai client")


def refuse_in_options(body: Mapping[str, Any]) -> None:
    """Reject a policy among a request's options for the processor, the chat template or the sampler.

    Raises:
        InvalidField: names the field.
    """
    for name in OPTIONS:
        options = body.get(name)
        if isinstance(options, Mapping):
            _refuse_inside(name, options, f"it in the field {FIELD}")


def refuse_misplaced(
    path: str,
    message: Mapping[str, Any],
    image_key: Callable[[Any], str | None],
    *,
    content: str = "content",
    beside: str = "image_url",
) -> None:
    """Reject a misspelt or misplaced ``pruning`` in a message.

    Args:
        path: path of the message.
        message: the message.
        image_key: the key of the image in a content part; None if it holds none.
        content: key of the content parts.
        beside: usual key of images, for the error.

    Raises:
        InvalidField: names the field.
    """
    accepted = f"it beside {beside}, in a content part that holds an image"
    _refuse_inside(path, message, f"{accepted}, or at the top level of the request")
    refuse_misplaced_in_parts(f"{path}.{content}", message.get(content), image_key, accepted)


def refuse_misplaced_in_parts(
    parent: str, parts: object, image_key: Callable[[Any], str | None], accepted: str
) -> None:
    """`refuse_misplaced` for a list of content parts.

    Args:
        parent: path of the list.
        parts: the list; anything else has no parts.
        image_key: the key of the image in a content part; None if it holds none.
        accepted: where a policy may stand.

    Raises:
        InvalidField: names the field.
    """
    for number, part in enumerate(parts if isinstance(parts, list) else ()):
        if not isinstance(part, Mapping):
            continue
        path = f"{parent}.{number}"
        key = image_key(part)
        if key is None and part.get(FIELD) is None:
            part = {name: value for name, value in part.items() if name != FIELD}
        if key is None:
            _refuse_inside(path, part, accepted)
            continue
        for name in part:
            if name != FIELD and resembles_pruning(name):
                raise misspelt(f"{path}.{name}")
        if isinstance(part.get(key), Mapping):
            _refuse_inside(f"{path}.{key}", part[key], f"it beside {key}, not inside")


def _refuse_inside(path: str, inner: Mapping[str, Any], accepted: str) -> None:
    for key in inner:
        if resembles_pruning(key):
            raise refused(f"{path}.{key}", "misplaced policy", accepted)


def misspelt(path: str) -> InvalidField:
    """The error of a field that is probably a misspelt ``pruning``."""
    return refused(path, f"unknown field (did you mean {FIELD}?)", "a field of the API")


def normalised(message: Any) -> Any:
    """Convert plain URLs of a message into objects, and ``input_image`` (OpenAI's Responses API) into ``image_url``."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_normalised_part(part) for part in content]}


def _normalised_part(part: Any) -> Any:
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


def check_parts(parent: str, message: Mapping[str, Any]) -> None:
    """Reject content parts of a normalised message that vLLM would reject without a path.

    Raises:
        InvalidField: names the field, its value and what is accepted.
    """
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        path = f"{parent}.content.{number}"
        if not isinstance(part, Mapping):
            raise not_accepted(path, part, "an object with a type")
        for key, value, accepted in _invalid_keys(part):
            raise not_accepted(f"{path}.{key}", value, accepted)


def _invalid_keys(part: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Key, value and accepted values of every invalid key of a content part."""
    kind, uuid = part.get("type", MISSING), part.get("uuid")
    if uuid is not None and (isinstance(uuid, bool) or not isinstance(uuid, str | int)):
        yield "uuid", uuid, "a string"
    if kind == "input_image":
        yield "image_url", part.get("image_url", MISSING), "a URL"
    elif not isinstance(kind, str) or kind not in PART_TYPES:
        if kind is not MISSING or not any(key in part for key in PART_TYPES):
            yield "type", kind, f"one of {', '.join(PART_TYPES)}"
    elif kind in TEXT_KEYS:
        key = TEXT_KEYS[kind]
        text = part.get(key, MISSING)
        if not isinstance(text, str) and (text is not None or kind == "tool_reference"):
            yield key, text, "a string"
    elif kind in URL_KEYS:
        yield from _invalid_url(kind, part.get(kind, MISSING), named=uuid is not None)
    elif kind in EMBEDDINGS:
        value = part.get(EMBEDDINGS[kind])
        if value is not None and not isinstance(value, str | Mapping):
            yield EMBEDDINGS[kind], value, "a string, or an object of strings"
    elif kind == "input_audio":
        audio = part.get(kind, MISSING)
        if not isinstance(audio, Mapping):
            yield kind, audio, "an object with data and format"


def _invalid_url(key: str, value: object, *, named: bool) -> Iterator[tuple[str, object, str]]:
    if value is None and named:
        return
    if not isinstance(value, Mapping):
        yield key, value, "a URL, or an object with a url"
        return
    url = value.get("url", MISSING)
    if not isinstance(url, str) and not (url is None and named):
        yield f"{key}.url", url, "a string"
    if key == "image_url":
        yield from invalid_detail(value, f"{key}.detail")


def invalid_detail(image: Mapping[str, Any], path: str = "detail") -> Iterator[tuple[str, object, str]]:
    """Path, value and accepted values of the ``detail`` in an object, if that is none of OpenAI's."""
    detail = image.get("detail", "auto")
    if not isinstance(detail, str) or detail not in DETAILS:
        yield path, detail, f"one of {', '.join(DETAILS)}"


TOOL_CALLS = TypeAdapter(list[ChatCompletionMessageToolCallUnionParam])


def check_tool_calls(at: Path, message: Mapping[str, Any]) -> None:
    """Reject tool calls that vLLM rejects without a path; ``at`` is the path of their message.

    Raises:
        InvalidField: names the field, its value and what is accepted.
    """
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise not_accepted(".".join(map(str, (*at, "tool_calls"))), calls, "a list of calls")
    try:
        TOOL_CALLS.validate_python(calls or [])
    except ValidationError as invalid:
        raise located(invalid, (*at, "tool_calls"), nested(at, message)) from None


def validate_lists(messages: list[Any], body: Mapping[str, Any], at: Path = ("messages",)) -> None:
    """Validate the lazily validated lists of messages now, so that errors get a path.

    Args:
        messages: the request's messages. Pydantic validates some of their lists while they are iterated; these are
            replaced by lists.
        body: the validated body.
        at: path of the messages.

    Raises:
        InvalidField: names the field, its value and what is accepted.
    """
    for index, message in enumerate(messages):
        for key, value in message.items() if isinstance(message, dict) else ():
            if not isinstance(value, Iterator):
                continue
            try:
                message[key] = list(value)
            except ValidationError as invalid:
                raise located(invalid, (*at, index, key), body) from None

"""Readable validation errors: one problem, the client's path, bounded length.

Pydantic's report, which vLLM forwards, lists every branch of every union, with names of Python classes.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError, VLLMValidationError

MAX_MESSAGE = 1000  # characters
MAX_PARAM = 200
Path: TypeAlias = tuple[str | int, ...]

CONTENT_TYPE = "Content-Type: expected application/json."


class InvalidField(VLLMValidationError):
    """A rejected field; the message names it."""

    def __str__(self) -> str:
        return str(self.args[0])


def explain(error: Exception) -> ErrorResponse | None:
    """The response to a client error; None for a server error."""
    if isinstance(error, RequestValidationError):
        message, param = explain_validation(error.errors(), error.body)
    elif isinstance(error, ValidationError):  # from a part that vLLM validates later
        message, param = explain_validation(error.errors(), None)
    elif isinstance(error, VLLMValidationError):
        message, param = (str(error.args[0]) if error.args else ""), error.parameter
    elif isinstance(error, HTTPException) and error.status_code == 400:
        message, param = "The body cannot be parsed.", None  # such as too long numbers or too deep nesting
    else:
        answer = create_error_response(error)
        if answer.error.code >= 500:
            return None
        answer.error.message = _outward(answer.error.message, error)
        return bounded(answer)
    return bounded(ErrorResponse(error=ErrorInfo(message=message, type="BadRequestError", param=param, code=400)))


def bounded(answer: ErrorResponse) -> ErrorResponse:
    """Cut an answer's message and path, which may repeat client text, to bounded lengths."""
    answer.error.message = _cut(answer.error.message, MAX_MESSAGE)
    if answer.error.param is not None:
        answer.error.param = _cut(answer.error.param, MAX_PARAM)
    return answer


def _outward(message: str, error: Exception) -> str:
    """A message without internals of the server: the error's own, or else its cause's."""
    if isinstance(error, VLLMError) or not INTERNAL.search(message):
        return message
    reason = str(error.__cause__ or "")
    if not reason or INTERNAL.search(reason):
        reason = "no reason stated"
    return f"The model's processor rejects this request: {reason}"


INTERNAL = re.compile(
    r"ChatCompletion|\w+Param\b|\w+Processor\b|Traceback|pydantic|<\w+[.\w]* |\btensor\(|\b(?:vllm|torch|numpy)\b|"
    r"\.py\b|/\w+/\w+"
)
"""Names of Python objects and file paths."""


def explain_validation(errors: Sequence[Any], body: object) -> tuple[str, str | None]:
    """Summarise validation errors of a body.

    Args:
        errors: errors of pydantic or FastAPI.
        body: the parsed body.

    Returns:
        A sentence, and the path of the field.
    """
    details = [error for error in errors if isinstance(error, Mapping)]
    if not details:  # vLLM's check of the content type, which has no details
        return CONTENT_TYPE, None
    if details[0]["type"] == "missing" and tuple(details[0]["loc"]) == ("body",):
        return "The body: nothing given; expected a JSON object.", None
    if details[0]["type"] == "json_invalid":
        return f"The body is not valid JSON: {details[0].get('ctx', {}).get('error', 'it cannot be parsed')}.", None

    if body is None:
        first = details[0]
        body, details = nested(first["loc"], first.get("input")), [first]
    paths = [_path(error, body) for error in details]
    path = _most_telling(details, paths)
    accepted = dict.fromkeys(_expectation(error) for error, at in zip(details, paths, strict=True) if at == path)
    if path or not isinstance(body, Mapping):
        value = _at(body, path)
        problem = "nothing given" if value is MISSING else f"{shown(value)} is not accepted"
    else:
        problem = "a part of it is not accepted"
    name = ".".join(_cut(str(key), 64) for key in path)
    return f"{name or 'The body'}: {problem}; expected {' or '.join(accepted)}.", name or None


def _most_telling(details: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> Path:
    """The path at which most union branches failed; the deepest of several.

    If that is the tag of the union, but one branch accepts the tag, the path of that branch's error.
    """
    counts = Counter(paths)
    path = max(counts, key=lambda path: (counts[path], len(path)))
    kinds = {error["type"] for error, at in zip(details, paths, strict=True) if at == path}
    if kinds == {"literal_error"}:
        for error, at in zip(details, paths, strict=True):
            if at[: len(path) - 1] == path[:-1] and at != path and error["type"] not in ("literal_error", "missing"):
                return at
    return path


def nested(keys: Sequence[str | int], value: object) -> object:
    """An object with a value at the end of a path of keys."""
    for key in reversed(keys):
        value = {key: value}
    return value


def check_messages(messages: object, path: str = "messages") -> None:
    """Reject messages of a shape on which validation itself would fail.

    Args:
        messages: the messages.
        path: their path.

    Raises:
        InvalidField: names the field, its value and what is accepted.
    """
    if not isinstance(messages, list) or not messages:
        raise not_accepted(path, messages, "a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise not_accepted(f"{path}.{index}", message, "an object with a role and content")
        content = message.get("content")
        if isinstance(content, Mapping) or not (content is None or isinstance(content, Iterable)):
            raise not_accepted(f"{path}.{index}.content", content, "a string or a list of content parts")
        texts = [(f"{path}.{index}.content", content)]
        if isinstance(content, list):
            parts = [(number, part) for number, part in enumerate(content) if isinstance(part, Mapping)]
            texts = [(f"{path}.{index}.content.{number}.text", part.get("text")) for number, part in parts]
        for place, text in texts:
            if isinstance(text, str) and not _encodes(text):
                raise not_accepted(place, text, "text without lone surrogates")


def wrong_field(model: type[BaseModel], data: object) -> InvalidField:
    """The error of the first invalid field of a body, each validated separately."""
    for name, value in data.items() if isinstance(data, Mapping) else ():
        field = model.model_fields.get(name)
        if field is None or field.annotation is None:
            continue
        try:
            TypeAdapter[Any](field.annotation).validate_python(value)
        except ValidationError as invalid:
            return located(invalid, (name,), data)
    return InvalidField("The body: a part of it is not accepted.")


def located(invalid: ValidationError, at: Path, body: object) -> InvalidField:
    """The error of a part of a body that was validated separately, with its path ``at``."""
    message, param = explain_validation([{**error, "loc": (*at, *error["loc"])} for error in invalid.errors()], body)
    return InvalidField(message, parameter=param or ".".join(map(str, at)))


def _encodes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


MISSING = object()
"""Value of a missing key."""


def not_accepted(path: str, value: object, accepted: str) -> InvalidField:
    """The error of a rejected or missing value."""
    return refused(path, "nothing given" if value is MISSING else f"{shown(value)} is not accepted", accepted)


def refused(path: str, problem: str, accepted: str) -> InvalidField:
    """The error of a field in one sentence: its path, the problem, and what is accepted."""
    return InvalidField(f"{path}: {problem}; expected {accepted}.", parameter=path)


def _path(error: Mapping[str, Any], body: object) -> Path:
    """The path of an error, without pydantic's validator names; empty if unknown."""
    keys = list(error["loc"])
    keys = keys[1:] if keys[:1] == ["body"] else keys
    path: list[str | int] = []
    value = body
    for index, key in enumerate(keys):
        inner = _at(value, (key,))
        if inner is not MISSING:
            path.append(key)
            value = inner
        elif isinstance(key, int):  # an item that does not exist at this path
            return ()
        elif error["type"] == "missing" and index == len(keys) - 1:
            path.append(key)
    return tuple(path)


def _at(value: Any, path: Sequence[str | int]) -> Any:
    """The value at a path; `MISSING` if there is none."""
    for key in path:
        in_list = isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value)
        if not in_list and not (isinstance(value, Mapping) and key in value):
            return MISSING
        value = value[key]
    return value


def shown(value: object) -> str:
    """A short form of a value for a message."""
    try:
        return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"<{type(value).__name__}>"


def _expectation(error: Mapping[str, Any]) -> str:
    """The accepted values, from pydantic's "Input should be ..."."""
    if error["type"] == "missing":
        return "a value"
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    text = text.partition(" or instance of ")[0].partition(" or object to ")[0].partition(", unable to ")[0]
    text = text.partition(" or an instance of ")[0].replace("a valid ", "a ")
    return text.replace("a dictionary", "an object").replace("a integer", "an integer")


def _cut(text: str, limit: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be encoded in the response
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

"""``/v1/responses``: OpenAI's Responses API with the field ``pruning`` and the report."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request
from openai.types.responses import ResponseErrorEvent
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.outputs import RequestOutput

from vllm_vtprune_server.content import invalid_detail, refuse_misplaced
from vllm_vtprune_server.conversation import (
    INPUT_IMAGE,
    Conversation,
    get,
    image_key,
    images_of,
    parts_of,
    text_of,
    without_pruning,
)
from vllm_vtprune_server.protocol import PruningRequest
from vllm_vtprune_server.serving import Prunes, watch
from vllm_vtprune_server.trace import USAGE_KEY
from vllm_vtprune_server.validation import MISSING, bounded, not_accepted, refused

TEXTS = ("input", "instructions", "tools", "chat_template_kwargs")
"""Fields of a request whose texts enter the prompt."""
ROLES = ("user", "assistant", "system", "developer")
PART_TYPES = ("input_text", INPUT_IMAGE, "input_file")
"""Types of content parts in a message that is not the assistant's."""


class PruningResponsesRequest(PruningRequest, ResponsesRequest):
    """``/v1/responses``."""

    parts_field = "input"

    @classmethod
    def read(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[Conversation]]:
        items = data.get("input")
        conversation = Conversation(
            texts={name: data[name] for name in TEXTS if name in data},
            continues=data.get("previous_response_id") is not None,
            stored=data.get("store", True) is True,
        )
        if isinstance(items, str):
            conversation.last_turn = items
        elif isinstance(items, list):
            data["input"] = [_read_item(f"input.{index}", item, conversation) for index, item in enumerate(items)]
        return data, [conversation]

    @classmethod
    def explain_invalid(cls, data: Any) -> None:
        items = get(data, "input")
        for index, item in enumerate(items if isinstance(items, list) else ()):
            reference = isinstance(item, Mapping) and item.keys().isdisjoint(("role", "content"))
            if get(item, "type") == "message" or (get(item, "type") is None and not reference):
                _check_message(f"input.{index}", item)

    @classmethod
    def is_image(cls, part: Mapping[str, Any]) -> bool:
        return part.get("properties", {}).get("type", {}).get("const") == INPUT_IMAGE


def _read_item(path: str, item: Any, conversation: Conversation) -> Any:
    """An item of the input without our field; adds its images and text to the conversation."""
    if not isinstance(item, Mapping):
        return item
    key = "output" if str(item.get("type")).endswith("_call_output") else "content"
    refuse_misplaced(path, item, image_key, content=key)
    for index, part in enumerate(parts_of(item, key)):
        if get(part, "type") == INPUT_IMAGE:
            _check_image(f"{path}.{key}.{index}", part, item)
    if item.get("role") == "assistant" and isinstance(item.get("content"), list):
        _check_answer(path, item["content"])
    text = text_of(item, key)
    if item.get("role") == "user" and text:
        conversation.last_turn = text
    message_text = text if item.get("role") == "user" else conversation.last_turn
    parts = [part if get(part, "type") == INPUT_IMAGE else {} for part in parts_of(item, key)]
    conversation.images = [*conversation.images, *images_of(f"{path}.{key}", parts, message_text)]
    return without_pruning(item, key)


def _check_message(path: str, item: Any) -> None:
    """Name what is wrong in an invalid message. Pydantic's first error may be of another type of item."""
    if not isinstance(item, Mapping):
        raise not_accepted(path, item, "an object")
    role, content = item.get("role", MISSING), item.get("content", MISSING)
    if role not in ROLES:
        raise not_accepted(f"{path}.role", role, f"one of {', '.join(ROLES)}")
    if role == "assistant" or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise not_accepted(f"{path}.content", content, "a string or a list of content parts")
    for index, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise not_accepted(f"{path}.content.{index}", part, "an object")
        kind = part.get("type", MISSING)
        if kind not in PART_TYPES:
            raise not_accepted(f"{path}.content.{index}.type", kind, f"one of {', '.join(PART_TYPES)}")
        if kind == "input_text" and not isinstance(part.get("text"), str):
            raise not_accepted(f"{path}.content.{index}.text", part.get("text", MISSING), "a string")


def _check_answer(path: str, parts: list[Any]) -> None:
    """Reject an answer of the assistant without a text first, where vLLM 0.32.0 would fail with status 500."""
    if not parts:
        raise not_accepted(f"{path}.content", parts, "a string, or a list that begins with a text")
    if isinstance(parts[0], Mapping) and not isinstance(parts[0].get("text"), str):
        raise not_accepted(f"{path}.content.0.text", parts[0].get("text", MISSING), "a string")


def _check_image(path: str, part: Mapping[str, Any], item: Mapping[str, Any]) -> None:
    """Reject an image that vLLM would reject without a path, or drop."""
    if item.get("role") == "assistant":
        accepted = "it in a message of the user or in the result of a tool"
        raise refused(path, "an image in a message of the assistant", accepted)
    url = part.get("image_url", MISSING)
    if not isinstance(url, str):
        raise not_accepted(f"{path}.image_url", url, "a URL (files of other requests are not kept)")
    for name, value, accepted in invalid_detail(part):
        raise not_accepted(f"{path}.{name}", value, accepted)


class PruningServingResponses(Prunes, OpenAIServingResponses):
    """The handler; the report is part of the response, also where that is stored or ends a stream."""

    async def create_responses(self, request: ResponsesRequest, raw_request: Request | None = None) -> Any:
        if not isinstance(request, PruningResponsesRequest):
            return await super().create_responses(request, raw_request)
        request.trace.request_id = request.request_id
        response = self.resolve_alias(request) or await super().create_responses(request, raw_request)
        if isinstance(response, ErrorResponse):
            return bounded(response)
        return response if isinstance(response, ResponsesResponse) else _ended(response)

    async def responses_full_generator(
        self, request: ResponsesRequest, sampling_params: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> ErrorResponse | ResponsesResponse:
        watched = _watched(request, result_generator)
        response = await super().responses_full_generator(request, sampling_params, watched, *args, **kwargs)
        if isinstance(request, PruningResponsesRequest) and isinstance(response, ResponsesResponse):
            response.pruning = request.trace.to_json()  # the models allow extra fields
            tokens = request.trace.usage()
            if tokens is not None:
                setattr(response.usage.input_tokens_details, USAGE_KEY, tokens)
        return response

    def responses_stream_generator(
        self, request: ResponsesRequest, sampling_params: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        watched = _watched(request, result_generator)
        return super().responses_stream_generator(request, sampling_params, watched, *args, **kwargs)


def _watched(request: ResponsesRequest, contexts: Any) -> Any:
    if not isinstance(request, PruningResponsesRequest):
        return contexts
    return watch(contexts, request.trace, _output_of, stream=bool(request.stream))


def _output_of(context: Any) -> RequestOutput | None:
    output = getattr(context, "last_output", None)
    return output if isinstance(output, RequestOutput) else None


async def _ended(events: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Forward a stream; if it fails, end it with an error event, where vLLM closes the connection."""
    number = 0
    try:
        async with aclosing(events):
            async for event in events:
                number = getattr(event, "sequence_number", number) + 1
                yield event
    except Exception as error:
        info = bounded(create_error_response(error)).error
        yield ResponseErrorEvent(
            type="error", code=info.type, message=info.message, param=info.param, sequence_number=number
        )

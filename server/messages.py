"""``/v1/messages``: Anthropic's Messages API with the field ``pruning`` and the report."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request
from pydantic import Field
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicCountTokensResponse,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from vllm_vtprune_server.content import invalid_detail, refuse_misplaced, refuse_misplaced_in_parts
from vllm_vtprune_server.conversation import Conversation, ImagePart, get, parts_of, text_of
from vllm_vtprune_server.protocol import PruningChatCompletionRequest, PruningRequest
from vllm_vtprune_server.route import anthropic_error
from vllm_vtprune_server.serving import PrunesChat
from vllm_vtprune_server.stream import read_event, write_event
from vllm_vtprune_server.validation import bounded, check_messages, not_accepted

TEXTS = ("system", "messages", "tools", "chat_template_kwargs")
"""Fields of a request whose texts enter the prompt."""

SOURCE = "source"
ACCEPTED = 'an object with type "base64", media_type and data, or with type "url" and url'
MEDIA_TYPES = "that of an image, such as image/jpeg, image/png, image/gif or image/webp"
BESIDE = f"it beside {SOURCE}, in a block that holds an image"
ERROR_EVENT = 'data: {"error":'
OWN_KEYS = ("pruning", "detail")


class _ReadsBlocks(PruningRequest):
    """What requests to count and to answer share."""

    @classmethod
    def read(cls, data: dict[str, Any]) -> tuple[dict[str, Any], list[Conversation]]:
        messages = data.get("messages")
        conversation = Conversation(texts={name: data[name] for name in TEXTS if name in data})
        if messages is not None:
            check_messages(messages)
            read = [_read_message(f"messages.{index}", message, conversation) for index, message in enumerate(messages)]
            data["messages"] = read
        return data, [conversation]

    @classmethod
    def is_image(cls, part: Mapping[str, Any]) -> bool:
        return SOURCE in part.get("properties", {})


class PruningMessagesRequest(_ReadsBlocks, AnthropicMessagesRequest):
    """``/v1/messages``."""


class PruningCountTokensRequest(_ReadsBlocks, AnthropicCountTokensRequest):
    """``/v1/messages/count_tokens``."""


class PruningMessage(AnthropicMessagesResponse):
    """An answer with the report."""

    pruning: dict[str, Any] | None = Field(default=None, description="What was done to each image.")


class PruningTokenCount(AnthropicCountTokensResponse):
    """A count of tokens with the report."""

    pruning: dict[str, Any] | None = Field(default=None, description="What would be done to each image.")


def _source_key(block: Any) -> str | None:
    return SOURCE if get(block, "type") == "image" else None


def _read_message(path: str, message: Mapping[str, Any], conversation: Conversation) -> Mapping[str, Any]:
    """A message without our fields; adds its images, in the order in which vLLM puts them, to the conversation.

    vLLM 0.32.0 (entrypoints/anthropic/serving.py) makes a message of its own of the images in a user's tool results,
    before the rest of the message, and drops images of system messages.
    """
    refuse_misplaced(path, message, _source_key, beside=SOURCE)
    blocks, text, role = parts_of(message), text_of(message), message.get("role")
    if role == "user" and text:
        conversation.last_turn = text
    if not blocks:
        return message
    text = text or conversation.last_turn
    images: list[ImagePart] = []
    results: list[ImagePart] = []
    read = []
    for index, block in enumerate(blocks):
        at = f"{path}.content.{index}"
        if get(block, "type") == "tool_result":
            inside = parts_of(block)
            refuse_misplaced_in_parts(f"{at}.content", inside, _source_key, BESIDE)
            results += _images(f"{at}.content", enumerate(inside), text)
            read.append({**block, "content": [_without_own(part) for part in inside]} if inside else block)
        else:
            images += _images(f"{path}.content", [(index, block)], text)
            read.append(_without_own(block))
    if role == "user":
        conversation.images = [*conversation.images, *results, *images]
    elif role == "assistant":
        conversation.images = [*conversation.images, *images]
    return {**message, "content": read}


def _images(path: str, blocks: Iterable[tuple[int, Any]], text: str) -> Iterator[ImagePart]:
    """The images of numbered blocks.

    Raises:
        InvalidField: an image has no source that vLLM reads, or an unknown ``detail``.
    """
    for index, block in blocks:
        if _source_key(block) is None:
            continue
        at, source = f"{path}.{index}", block.get(SOURCE)
        if not _is_source(source):
            raise not_accepted(f"{at}.{SOURCE}", source, ACCEPTED)
        media_type = source.get("media_type")
        if media_type is not None and not media_type.lower().startswith("image/"):
            raise not_accepted(f"{at}.{SOURCE}.media_type", media_type, MEDIA_TYPES)
        for name, value, accepted in invalid_detail(block):
            raise not_accepted(f"{at}.{name}", value, accepted)
        pruning, detail = block.get("pruning"), block.get("detail")
        yield ImagePart(at, message_text=text, pruning=pruning, detail=detail, key=SOURCE, value=source)


def _is_source(source: Any) -> bool:
    kind, media_type = get(source, "type"), get(source, "media_type")
    data = get(source, "url" if kind == "url" else "data")
    return kind in ("url", "base64", None) and isinstance(data, str) and isinstance(media_type, str | None)


def _without_own(block: Any) -> Any:
    if _source_key(block) is None:
        return block
    return {key: value for key, value in block.items() if key not in OWN_KEYS}


class PruningServingMessages(PrunesChat, AnthropicServingMessages):
    """The handler: converts to a chat completion, which is pruned, and adds the report to what vLLM makes of it."""

    @classmethod
    def to_chat_completion_request(cls, anthropic_request: Any, **options: Any) -> Any:
        request = super().to_chat_completion_request(anthropic_request, **options)
        if not isinstance(anthropic_request, PruningRequest):
            return request
        return PruningChatCompletionRequest.of(request, anthropic_request.conversation)

    async def create_messages(self, request: AnthropicMessagesRequest, raw_request: Request | None = None) -> Any:
        response = await super().create_messages(request, raw_request)
        if not isinstance(request, PruningRequest):
            return response
        if isinstance(response, ErrorResponse):
            return bounded(response)
        if isinstance(response, AnthropicMessagesResponse):
            return PruningMessage.model_construct(**dict(response), pruning=request.trace.to_json())
        return _reported(response, request)

    async def count_tokens(self, request: AnthropicCountTokensRequest, raw_request: Request | None = None) -> Any:
        response = await super().count_tokens(request, raw_request)
        if not isinstance(request, PruningRequest):
            return response
        if isinstance(response, ErrorResponse):
            return bounded(response)
        return PruningTokenCount.model_construct(**dict(response), pruning=request.trace.to_json())

    async def message_stream_converter(self, generator: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
        """vLLM's converter. That of 0.32.0 does not know error events; from 0.33 on, events are no strings."""
        failures: list[str] = []

        async def until_error() -> AsyncGenerator[Any, None]:
            async with aclosing(generator):
                async for event in generator:
                    if isinstance(event, str) and event.startswith(ERROR_EVENT):
                        failures.append(event)
                        return
                    yield event

        async for event in super().message_stream_converter(until_error()):
            yield event
        for failure in failures:
            error = ErrorInfo(**json.loads(failure.removeprefix("data:"))["error"])
            data = anthropic_error(ErrorResponse(error=error))
            yield write_event("error", {**data, "error": {**data["error"], "code": error.code}})


async def _reported(events: AsyncGenerator[str, None], request: PruningRequest) -> AsyncGenerator[str, None]:
    """Forward a stream, with the report in its ``message_delta``."""
    async with aclosing(events):
        async for event in events:
            name, data = read_event(event) if event.startswith("event: message_delta\n") else ("", {})
            yield write_event(name, {**data, "pruning": request.trace.to_json()}) if name else event

"""vLLM's handlers, with model aliases and a report per answer. `rendering` prunes for all of them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar

from fastapi import Request
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, PromptTokenUsageInfo
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.outputs import RequestOutput

from vllm_vtprune.plugin.compat import server as compat
from vllm_vtprune.sent_plan import PLANS
from vllm_vtprune_server.aliases import AliasedModels, UnknownPreset
from vllm_vtprune_server.protocol import PruningBatchRequest, PruningRequest
from vllm_vtprune_server.rendering import PruningRenderer
from vllm_vtprune_server.shutdown import ServerStopping, aborted_by_shutdown
from vllm_vtprune_server.stream import with_last_event_completed
from vllm_vtprune_server.trace import USAGE_KEY, Trace
from vllm_vtprune_server.validation import bounded

Results: TypeAlias = AsyncGenerator[RequestOutput, None]
Serving = TypeVar("Serving", bound="Prunes")
Result = TypeVar("Result")


class Prunes(compat.PropagatesCurrentSpan, BaseServing):
    """Mixin before a handler of vLLM, which is built with `take_over`."""

    online_renderer: PruningRenderer

    @classmethod
    def take_over(cls: type[Serving], stock: BaseServing, renderer: PruningRenderer) -> Serving:
        """Create a handler from vLLM's.

        Args:
            stock: the handler that vLLM built from its options; do not use it afterwards.
            renderer: our renderer.
        """
        serving = compat.take_over(cls, stock)
        serving.online_renderer = renderer
        return serving

    def resolve_alias(self, request: Any) -> ErrorResponse | None:
        """Replace an alias by its model's name, and record its preset.

        Returns:
            The error of an alias with an unknown preset.
        """
        if not isinstance(request, PruningRequest):
            return None
        registry: AliasedModels = self.models.registry
        named: Any = request
        try:
            resolved = registry.resolve(named.model)
        except UnknownPreset as error:
            request.trace.unknown_preset = True
            status = HTTPStatus.NOT_FOUND
            return self.create_error_response(str(error), err_type="NotFoundError", status_code=status, param="model")
        if resolved is not None:
            named.model, request.trace.alias_preset = resolved
        return None


class PrunesChat(Prunes, OpenAIServingChat):
    """Mixin for handlers that answer through chat completions."""

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        return self.resolve_alias(request) or await super().render_chat_request(request)

    def chat_completion_stream_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        watched = _watched(request, result_generator, request_id)
        return super().chat_completion_stream_generator(request, watched, request_id, *args, **kwargs)

    async def chat_completion_full_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        *args: Any,
        **kwargs: Any,
    ) -> ErrorResponse | ChatCompletionResponse:
        watched = _watched(request, result_generator, request_id)
        return await super().chat_completion_full_generator(request, watched, request_id, *args, **kwargs)


class PruningServingChat(PrunesChat):
    """``/v1/chat/completions``; chat templates, tools, streaming and sampling are vLLM's."""

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | ChatCompletionResponse | ErrorResponse:
        response = await super().create_chat_completion(request, raw_request)
        if not isinstance(request, PruningRequest):
            return response
        if isinstance(response, ErrorResponse):
            return bounded(response)
        if isinstance(response, ChatCompletionResponse):
            response.pruning = request.trace.to_json()  # the model allows extra fields
            if request.trace.report is not None and request.trace.report.plans:
                setattr(response, PLANS, request.trace.report.plans)
            _complete_usage(response, request.trace)
            return response
        return with_last_event_completed(response, partial(_complete_event, trace=request.trace))


class PruningServingBatch(PrunesChat, OpenAIServingChatBatch):
    """``/v1/chat/completions/batch``."""

    async def render_batch_chat_request(self, request: BatchChatCompletionRequest) -> Any:
        return self.resolve_alias(request) or await super().render_batch_chat_request(request)

    async def create_batch_chat_completion(
        self, request: BatchChatCompletionRequest, raw_request: Request | None = None
    ) -> ChatCompletionResponse | ErrorResponse:
        response = await super().create_batch_chat_completion(request, raw_request)
        if not isinstance(request, PruningBatchRequest):
            return response
        if isinstance(response, ErrorResponse):
            return bounded(response)
        for choice in response.choices:
            choice.pruning = request.trace.to_json(request.conversations[choice.index].report)
        _complete_usage(response, request.trace)
        return response

    async def chat_completion_full_generator_batch(
        self,
        request: BatchChatCompletionRequest,
        generators: list[AsyncGenerator[RequestOutput, None]],
        request_id: str,
        *args: Any,
        **kwargs: Any,
    ) -> ErrorResponse | ChatCompletionResponse:
        watched = [_watched(request, generator, request_id) for generator in generators]
        return await super().chat_completion_full_generator_batch(request, watched, request_id, *args, **kwargs)


def _watched(request: Any, results: Results, request_id: str) -> Results:
    if not isinstance(request, PruningRequest):
        return results
    request.trace.request_id = request_id
    return watch(results, request.trace, lambda result: result, stream=bool(getattr(request, "stream", False)))


async def watch(
    results: AsyncGenerator[Result, None],
    trace: Trace,
    output_of: Callable[[Result], RequestOutput | None],
    *,
    stream: bool,
) -> AsyncGenerator[Result, None]:
    """Forward results and record the time to first token; fail if the engine aborted the request during shutdown.

    In a stream, the first result is the first token. Otherwise there is one result at the end, and the time comes from
    vLLM's statistics, unless they are off.

    Args:
        results: results of the engine, or what holds them.
        trace: the request's record.
        output_of: the engine's output of a result; None if it has none.
        stream: whether each result is sent at once.
    """
    async with aclosing(results):
        async for result in results:
            output = output_of(result)
            if output is not None:
                if trace.ttft is None:
                    stats = output.metrics
                    if stream:
                        trace.ttft = time.time() - trace.started
                    elif stats is not None and stats.first_token_latency > 0:
                        trace.ttft = stats.arrival_time + stats.first_token_latency - trace.started
                if await aborted_by_shutdown(output):
                    raise ServerStopping
            yield result


def _complete_usage(response: ChatCompletionResponse, trace: Trace) -> None:
    """Add the report's short form to the usage, whose model allows extra fields."""
    tokens = trace.usage()
    if tokens is not None:
        details = response.usage.prompt_tokens_details or PromptTokenUsageInfo()
        setattr(details, USAGE_KEY, tokens)
        response.usage.prompt_tokens_details = details


def _complete_event(event: dict[str, Any], trace: Trace) -> None:
    """Add the report to the last event of a stream, which holds usage only on request."""
    event["pruning"] = trace.to_json()
    tokens = trace.usage()
    usage = event.get("usage")
    if usage is not None and tokens is not None:
        usage["prompt_tokens_details"] = {**(usage.get("prompt_tokens_details") or {}), USAGE_KEY: tokens}

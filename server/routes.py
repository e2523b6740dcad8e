"""The routes in the place of vLLM's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from vllm.entrypoints.anthropic.protocol import AnthropicErrorResponse
from vllm.entrypoints.openai.chat_completion import api_router as stock_chat
from vllm.entrypoints.openai.responses import api_router as stock_responses
from vllm.entrypoints.serve.dev.cache import api_router as stock_resets
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, ModelCard
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation

from vllm_vtprune_server.aliases import AliasedModels
from vllm_vtprune_server.examples import CHAT_COMPLETION
from vllm_vtprune_server.information import PruningInformation, pruning_information
from vllm_vtprune_server.messages import PruningCountTokensRequest, PruningMessagesRequest, PruningTokenCount
from vllm_vtprune_server.outcome import BATCH_ROUTE, COUNT_ROUTE, MESSAGES_ROUTE, RESPONSES_ROUTE, ROUTE, TRACE
from vllm_vtprune_server.plan import router as plan_router
from vllm_vtprune_server.protocol import PruningBatchRequest, PruningChatCompletionRequest, PruningRequest
from vllm_vtprune_server.rendering import PruningRenderer
from vllm_vtprune_server.responses import PruningResponsesRequest
from vllm_vtprune_server.route import MessagesRoute, PruningRoute, anthropic_error
from vllm_vtprune_server.trace import HEADER, Trace

Route: TypeAlias = Callable[[Any, Request], Awaitable[Any]]

router = APIRouter(route_class=PruningRoute)
router.include_router(plan_router)
messages_router = APIRouter(route_class=MessagesRoute)

REQUESTS: list[type[PruningRequest]] = []
"""The requests of the routes that prune, in the order of the routes."""

HEADER_SCHEMA = {
    "description": "Method, preset, images, visual and kept tokens. Sent before the first token.",
    "schema": {"type": "string", "example": "method=resprune, images=2, visual=1152, kept=214"},
}


def _prunes(
    path: str,
    model: type[PruningRequest],
    *statuses: int,
    to: APIRouter = router,
    error: type[BaseModel] = ErrorResponse,
    stream: bool = True,
    example: object = None,
    response_model: type[BaseModel] | None = None,
) -> Callable[[Route], Route]:
    """Decorate a route as vLLM has it: a POST with our request, and with the header in its answer.

    Args:
        path: its path.
        model: its request.
        statuses: statuses of its errors, besides 400, 404 and 500.
        to: the router.
        error: schema of its errors.
        stream: whether it can answer with a stream.
        example: an example of an answer.
        response_model: schema of its answers; None: none.
    """
    REQUESTS.append(model)
    content: dict[str, Any] = {"text/event-stream": {}} if stream else {}
    if example is not None:
        content["application/json"] = {"example": example}
    responses: dict[int | str, dict[str, Any]] = {200: {"headers": {HEADER: HEADER_SCHEMA}, "content": content}}
    responses |= {status: {"model": error} for status in sorted((400, 404, 500, *statuses))}

    def add(route: Route) -> Route:
        async def answer(request: Any, raw_request: Request) -> Any:
            request.trace = getattr(raw_request.state, TRACE, None) or Trace()
            response = await route(request, raw_request)
            is_complete = isinstance(response, Response) and response.status_code == 200
            if is_complete and request.trace.report is not None:
                response.headers[HEADER] = request.trace.header()
            return response

        answer.__name__, answer.__doc__ = route.__name__, route.__doc__
        answer.__annotations__ = {"request": model, "raw_request": Request}
        checks = [Depends(validate_json_request)]
        to.post(path, dependencies=checks, responses=responses, response_model=response_model)(answer)
        return route

    return add


@_prunes(ROUTE, PruningChatCompletionRequest, 501, example=CHAT_COMPLETION)
async def create_chat_completion(request: PruningChatCompletionRequest, raw_request: Request) -> Any:
    """Chat completions as vLLM serves them, with the `pruning` field in requests and responses."""
    return await stock_chat.create_chat_completion(request, raw_request)


@_prunes(BATCH_ROUTE, PruningBatchRequest, 501, stream=False)
async def create_batch(request: PruningBatchRequest, raw_request: Request) -> Any:
    """Batches of chat completions as vLLM serves them, with `pruning` in requests and in each choice."""
    return await stock_chat.create_batch_chat_completion(request, raw_request)


@_prunes(RESPONSES_ROUTE, PruningResponsesRequest)
async def create_response(request: PruningResponsesRequest, raw_request: Request) -> Any:
    """Responses as vLLM serves them, with the `pruning` field in requests and responses."""
    return await stock_responses.create_responses(request, raw_request)


# vLLM's own routes of messages log a traceback for each error of a client.


@_prunes(MESSAGES_ROUTE, PruningMessagesRequest, to=messages_router, error=AnthropicErrorResponse)
@with_cancellation
@load_aware_call
async def create_message(request: PruningMessagesRequest, raw_request: Request) -> Response:
    """Anthropic's messages as vLLM serves them, with the `pruning` field in requests and responses."""
    return _answer(await raw_request.app.state.anthropic_serving_messages.create_messages(request, raw_request))


@_prunes(
    COUNT_ROUTE,
    PruningCountTokensRequest,
    to=messages_router,
    error=AnthropicErrorResponse,
    stream=False,
    response_model=PruningTokenCount,
)
@with_cancellation
@load_aware_call
async def count_message_tokens(request: PruningCountTokensRequest, raw_request: Request) -> Response:
    """The tokens that a message would take, with the images pruned as in `/v1/messages`."""
    return _answer(await raw_request.app.state.anthropic_serving_messages.count_tokens(request, raw_request))


def _answer(response: Any) -> Response:
    """The response of the handler of messages."""
    if isinstance(response, ErrorResponse):
        return JSONResponse(anthropic_error(response), status_code=response.error.code)
    if isinstance(response, BaseModel):
        return JSONResponse(response.model_dump(exclude_none=True))
    return StreamingResponse(response, media_type="text/event-stream")


@router.get("/v1/models/{name:path}", response_model=ModelCard, responses={404: {"model": ErrorResponse}})
async def retrieve_model(name: str, raw_request: Request) -> Response:
    """One model, adapter or alias of `GET /v1/models`."""
    registry: AliasedModels = raw_request.app.state.openai_serving_models.registry
    try:
        card = await registry.retrieve(name)
    except LookupError as error:
        info = ErrorInfo(message=str(error), type="NotFoundError", param="model", code=404)
        return JSONResponse(ErrorResponse(error=info).model_dump(), status_code=404)
    return JSONResponse(card.model_dump())


@router.get("/v1/pruning")
async def show_pruning(raw_request: Request) -> PruningInformation:
    """Methods, presets, default, vision encoder and versions: what the `pruning` field of a request may contain."""
    state = raw_request.app.state
    registry: AliasedModels = state.openai_serving_models.registry
    renderer: PruningRenderer = state.openai_serving_chat.online_renderer
    return pruning_information(
        renderer.policies,
        renderer.processor,
        models=[model.name for model in registry.base_model_paths],
        aliases={alias: preset for alias, (_, preset) in registry.aliases.items()},
    )


resets = APIRouter()
"""Replace vLLM's routes that reset image caches, if the operator enabled them."""


@resets.post("/reset_mm_cache")
async def reset_mm_cache(raw_request: Request) -> Response:
    """Empty vLLM's caches of processed images, and the feature cache."""
    await asyncio.to_thread(raw_request.app.state.openai_serving_chat.online_renderer.runtime.forget_images)
    return await stock_resets.reset_mm_cache(raw_request)


@resets.post("/reset_encoder_cache")
async def reset_encoder_cache(raw_request: Request) -> Response:
    """Empty the engine's cache of encoded images, and the feature cache."""
    await asyncio.to_thread(raw_request.app.state.openai_serving_chat.online_renderer.runtime.forget_images)
    return await stock_resets.reset_encoder_cache(raw_request)

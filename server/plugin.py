"""The `vllm.endpoint_plugins` entry point: replaces vLLM's routes for conversations by ours."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import vllm
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.anthropic.protocol import AnthropicErrorResponse
from vllm.entrypoints.openai.chat_completion import api_router as stock_chat
from vllm.entrypoints.openai.responses import api_router as stock_responses
from vllm.entrypoints.serve.dev.cache import api_router as stock_resets
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, ModelCard
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.logger import init_logger

from vllm_vtprune import __version__, metrics
from vllm_vtprune.plugin.compat import api_process
from vllm_vtprune.plugin.compat.server import replace_registry
from vllm_vtprune.plugin.encoder_client import EncoderClient, socket_of
from vllm_vtprune.plugin.image import warm_up
from vllm_vtprune.plugin.placement import role_of
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.unpruned import UnprunedProcessor, runtime_without_tower
from vllm_vtprune.text import text_pipeline_name
from vllm_vtprune_server import media  # noqa: F401  (registers the media connector)
from vllm_vtprune_server.aliases import AliasedModels
from vllm_vtprune_server.elsewhere import MisplacedPolicyMiddleware, json_routes
from vllm_vtprune_server.examples import CHAT_COMPLETION
from vllm_vtprune_server.information import PruningInformation, pruning_information
from vllm_vtprune_server.messages import (
    PruningCountTokensRequest,
    PruningMessagesRequest,
    PruningServingMessages,
    PruningTokenCount,
)
from vllm_vtprune_server.outcome import (
    BATCH_ROUTE,
    COUNT_ROUTE,
    MESSAGES_ROUTE,
    PRUNING,
    RESPONSES_ROUTE,
    ROUTE,
    TRACE,
    OutcomeMiddleware,
)
from vllm_vtprune_server.plan import router as plan_router
from vllm_vtprune_server.playground import router as playground_router
from vllm_vtprune_server.policies import Policies, fixed_counts
from vllm_vtprune_server.protocol import PruningBatchRequest, PruningChatCompletionRequest, PruningRequest
from vllm_vtprune_server.ready import say_when_ready
from vllm_vtprune_server.rendering import PruningRenderer
from vllm_vtprune_server.responses import PruningResponsesRequest, PruningServingResponses
from vllm_vtprune_server.route import MessagesRoute, PruningRoute, anthropic_error
from vllm_vtprune_server.schema import describe_document
from vllm_vtprune_server.sender_cache import resend_unsent_images
from vllm_vtprune_server.serving import Prunes, PruningServingBatch, PruningServingChat
from vllm_vtprune_server.shutdown import fail_unfinished_requests, watch_shutdown
from vllm_vtprune_server.trace import HEADER, Trace

logger = init_logger("vllm.vtprune")

Route: TypeAlias = Callable[[Any, Request], Awaitable[Any]]

router = APIRouter(route_class=PruningRoute)
router.include_router(plan_router)
messages_router = APIRouter(route_class=MessagesRoute)


def _responses(
    error: type[BaseModel], *statuses: int, stream: bool = True, example: object = None
) -> dict[int | str, dict[str, Any]]:
    """What a route that prunes may answer."""
    header = {
        "description": "Method, preset, images, visual and kept tokens. Sent before the first token.",
        "schema": {"type": "string", "example": "method=resprune, images=2, visual=1152, kept=214"},
    }
    content: dict[str, Any] = {"text/event-stream": {}} if stream else {}
    if example is not None:
        content["application/json"] = {"example": example}
    return {200: {"headers": {HEADER: header}, "content": content}, **{status: {"model": error} for status in statuses}}


async def _answered(request: PruningRequest, raw_request: Request, route: Route) -> Any:
    """The answer of a route of vLLM, with the header."""
    request.trace = getattr(raw_request.state, TRACE, None) or Trace()
    response = await route(request, raw_request)
    if isinstance(response, Response) and response.status_code == 200 and request.trace.report is not None:
        response.headers[HEADER] = request.trace.header()
    return response


@router.post(
    ROUTE,
    dependencies=[Depends(validate_json_request)],
    responses=_responses(ErrorResponse, 400, 404, 500, 501, example=CHAT_COMPLETION),
)
async def create_chat_completion(request: PruningChatCompletionRequest, raw_request: Request) -> Any:
    """Chat completions as vLLM serves them, with the `pruning` field in requests and responses."""
    return await _answered(request, raw_request, stock_chat.create_chat_completion)


@router.post(
    BATCH_ROUTE,
    dependencies=[Depends(validate_json_request)],
    responses=_responses(ErrorResponse, 400, 404, 500, 501, stream=False),
)
async def create_batch(request: PruningBatchRequest, raw_request: Request) -> Any:
    """Batches of chat completions as vLLM serves them, with `pruning` in requests and in each choice."""
    return await _answered(request, raw_request, stock_chat.create_batch_chat_completion)


@router.post(
    RESPONSES_ROUTE, dependencies=[Depends(validate_json_request)], responses=_responses(ErrorResponse, 400, 404, 500)
)
async def create_response(request: PruningResponsesRequest, raw_request: Request) -> Any:
    """Responses as vLLM serves them, with the `pruning` field in requests and responses."""
    return await _answered(request, raw_request, stock_responses.create_responses)


@messages_router.post(
    MESSAGES_ROUTE,
    dependencies=[Depends(validate_json_request)],
    responses=_responses(AnthropicErrorResponse, 400, 404, 500),
)
async def create_message(request: PruningMessagesRequest, raw_request: Request) -> Any:
    """Anthropic's messages as vLLM serves them, with the `pruning` field in requests and responses."""
    return await _answered(request, raw_request, _create_message)


@with_cancellation
@load_aware_call
async def _create_message(request: PruningMessagesRequest, raw_request: Request) -> Response:
    """vLLM's route, which logs a traceback for each error of a client."""
    serving: PruningServingMessages = raw_request.app.state.anthropic_serving_messages
    response = await serving.create_messages(request, raw_request)
    if isinstance(response, ErrorResponse):
        return anthropic_error(response)
    if isinstance(response, BaseModel):
        return JSONResponse(response.model_dump(exclude_none=True))
    return StreamingResponse(response, media_type="text/event-stream")


@messages_router.post(
    COUNT_ROUTE,
    dependencies=[Depends(validate_json_request)],
    response_model=PruningTokenCount,
    responses=_responses(AnthropicErrorResponse, 400, 404, 500, stream=False),
)
async def count_message_tokens(request: PruningCountTokensRequest, raw_request: Request) -> Any:
    """The tokens that a message would take, with the images pruned as in `/v1/messages`."""
    return await _answered(request, raw_request, _count_tokens)


@with_cancellation
@load_aware_call
async def _count_tokens(request: PruningCountTokensRequest, raw_request: Request) -> Response:
    serving: PruningServingMessages = raw_request.app.state.anthropic_serving_messages
    response = await serving.count_tokens(request, raw_request)
    if isinstance(response, ErrorResponse):
        return anthropic_error(response)
    return JSONResponse(response.model_dump(exclude_none=True))


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


REQUESTS: tuple[type[PruningRequest], ...] = (
    PruningChatCompletionRequest,
    PruningBatchRequest,
    PruningResponsesRequest,
    PruningMessagesRequest,
    PruningCountTokensRequest,
)

HANDLERS: dict[str, type[Prunes]] = {
    "openai_serving_chat": PruningServingChat,
    "openai_serving_chat_batch": PruningServingBatch,
    "openai_serving_responses": PruningServingResponses,
    "anthropic_serving_messages": PruningServingMessages,
}
"""Attribute of the app's state -> our handler in the place of vLLM's."""


class ServerPlugin:
    """Loaded by vLLM in each API-server process when ``VLLM_PLUGINS`` names ``vtprune``."""

    name = "vtprune"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        self._app = app
        app.title, app.version = "vLLM with vllm-vtprune", __version__
        app.add_middleware(MisplacedPolicyMiddleware, routes=json_routes(app) - PRUNING)
        app.include_router(router)
        app.include_router(messages_router)
        describe_document(app, REQUESTS)
        if any(getattr(route, "path", None) == "/reset_mm_cache" for route in app.routes):
            app.include_router(resets)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Replace the chat handler; the server becomes healthy after this returns.

        Loads the vision encoder, or has the encoder process load it, if an operator's policy selects tokens outside
        the engine; otherwise the first request with such a policy loads it.

        Raises:
            RuntimeError: the model cannot be pruned, and the default policy prunes.
            PolicyError: the default or a preset is invalid, or not supported by this model.
            TowerError: the weights of the vision encoder are missing or do not fit, or its process did not start.
        """
        assert engine_client is not None  # the render server has none, and does not run the generate task
        mm_processor = engine_client.renderer.mm_processor
        config = engine_client.vllm_config
        encodes_only = config.is_mm_encoder_only and config.ec_transfer_config is None
        processor = mm_processor if isinstance(mm_processor, PruningProcessor) and not encodes_only else None
        reason = "this instance encodes only (mm_encoder_only)" if encodes_only else type(mm_processor).__name__
        policies = Policies.of(
            getattr(args, "pruning_default", None),
            getattr(args, "pruning_presets", None),
            fixed_counts=fixed_counts(engine_client.vllm_config.kv_transfer_config),
            follows_detail=getattr(args, "pruning_detail", False),
        )
        if processor is not None:
            processor.engine = engine_client.vllm_config
            placements = policies.placements(processor)
            if engine_client.vllm_config.parallel_config.data_parallel_size_local == 0:
                logger.warning("No engine runs on this machine: restart this process after an engine reloads weights")
            runtime = processor.runtime
            encoder_labels: tuple[str, ...] = "none", "none", "none"
            if processor.engine_placement.choice != "engine":
                facts = processor.encoder_facts
                encoder_labels = facts.labels
                path = socket_of(str(facts.device))
                if path is not None:
                    client = EncoderClient(path)
                    await asyncio.to_thread(client.connect)
                    runtime.encoder = client
            if "api" in placements:
                warm_up(processor)
            elif processor.engine_placement.choice != "engine":
                logger.info(
                    "The first request that selects tokens outside the engine loads the vision encoder: no default or "
                    "preset file does"
                )
        elif policies.default.enabled:
            raise RuntimeError(f"{args.model} cannot be pruned, as --pruning-default asks: {reason}")
        else:
            logger.warning("%s is served UNPRUNED: its processor cannot prune (%s)", args.model, reason)
            has_runtime = isinstance(mm_processor, UnprunedProcessor | PruningProcessor)
            runtime = mm_processor.runtime if has_runtime else runtime_without_tower(engine_client.model_config)
            encoder_labels = "none", "none", "none"
        runtime.clients_write_prompts = True
        metrics.start(runtime.model_name, policies.available)
        versions = (__version__, vllm.__version__)
        metrics.BUILD_INFO.labels(runtime.model_name, *versions, *encoder_labels, text_pipeline_name()).set(1)
        models = state.openai_serving_models
        replace_registry(models, AliasedModels(models, policies.available))
        renderer = PruningRenderer.take_over(
            state.online_renderer, processor=processor, runtime=runtime, policies=policies
        )
        renderer.role = role_of(config.ec_transfer_config)
        for name, handler in HANDLERS.items():
            setattr(state, name, handler.take_over(getattr(state, name), renderer))
        # Built once, as vLLM has done: in a second stack, what counts HTTP requests finds its metrics taken.
        stack = self._app.middleware_stack or self._app.build_middleware_stack()
        self._app.middleware_stack = OutcomeMiddleware(stack, runtime.model_name)
        if getattr(args, "pruning_playground", False):
            self._app.include_router(playground_router)
        resend_unsent_images(engine_client)
        watch_shutdown(state, engine_client)
        state.pruning_shutdown = asyncio.create_task(fail_unfinished_requests(state, engine_client))
        if api_process(engine_client.vllm_config.parallel_config)[0] == 0:
            name = models.base_model_paths[0].name
            ready = say_when_ready(args, name, policies, prunes=processor is not None)
            state.pruning_ready = asyncio.create_task(ready)

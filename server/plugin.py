"""The `vllm.endpoint_plugins` entry point: puts our chat completions in the place of vLLM's."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

import vllm
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion import api_router as stock
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.logger import init_logger

from vllm_vtprune import __version__, metrics
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.unpruned import runtime_without_tower
from vllm_vtprune.text import text_pipeline_name
from vllm_vtprune_server import media  # noqa: F401  (registers the media connector)
from vllm_vtprune_server.aliases import AliasedModels
from vllm_vtprune_server.information import PruningInformation, pruning_information
from vllm_vtprune_server.policies import Policies
from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.route import REACHED_HANDLER, PruningRoute
from vllm_vtprune_server.serving import PruningServingChat
from vllm_vtprune_server.shutdown import fail_unfinished_requests, notice_shutdown
from vllm_vtprune_server.trace import HEADER

logger = init_logger("vllm.vtprune")

router = APIRouter(route_class=PruningRoute)


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "headers": {
                HEADER: {
                    "description": "What was done to the images, known before the first token.",
                    "schema": {"type": "string", "example": "method=resprune, images=2, visual=1152, kept=214"},
                }
            },
        },
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse},
        500: {"model": ErrorResponse},
        501: {"model": ErrorResponse},
    },
)
async def create_chat_completion(request: PruningChatCompletionRequest, raw_request: Request) -> Any:
    """Chat completions as vLLM serves them, with the `pruning` field in requests and responses."""
    setattr(raw_request.state, REACHED_HANDLER, True)
    response = await stock.create_chat_completion(request, raw_request)
    if isinstance(response, Response) and request.trace.report is not None:
        response.headers[HEADER] = request.trace.header()
    return response


@router.get("/v1/pruning")
async def show_pruning(raw_request: Request) -> PruningInformation:
    """What requests to this server may ask for in their `pruning` field."""
    state = raw_request.app.state
    registry: AliasedModels = state.openai_serving_models.registry
    serving: PruningServingChat = state.openai_serving_chat
    return pruning_information(
        serving.policies,
        serving.runtime,
        prunes=serving.processor is not None,
        models=[model.name for model in registry.base_model_paths],
        aliases={alias: preset for alias, (_, preset) in registry.aliases.items()},
    )


class ServerPlugin:
    """Loaded by vLLM in each API-server process when ``VLLM_PLUGINS`` names ``vtprune``."""

    name = "vtprune"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Load the tower and take over the chat handler; the server is not healthy before this returns.

        Raises:
            RuntimeError: the model cannot be pruned, and the default asks for it.
            PolicyError: the default or a preset is not a policy, or not one for this model.
            TowerError: the weights of the vision tower are not there or do not fit.
        """
        assert engine_client is not None  # the render server has none, and does not run the generate task
        found = engine_client.renderer.mm_processor
        processor = found if isinstance(found, PruningProcessor) else None
        policies = Policies.of(getattr(args, "pruning_default", None), getattr(args, "pruning_presets", None))
        if processor is not None:
            policies.refuse_impossible(processor.family)
            runtime = processor.runtime
            runtime.api_process = compat.api_process(engine_client)
            runtime.warm_up()
            tower = runtime.tower
            built: tuple[str, str, str] = tower.weights, str(tower.device), str(tower.dtype).removeprefix("torch.")
        elif policies.default.enabled:
            raise RuntimeError(f"{args.model} cannot be pruned, as --pruning-default asks: {type(found).__name__}")
        else:
            logger.warning("%s is served UNPRUNED: nothing of ours can prune it (%s)", args.model, type(found).__name__)
            runtime = runtime_without_tower(engine_client.model_config)
            built = "none", "none", "none"
        metrics.start(runtime.model_name)
        metrics.BUILD_INFO.labels(runtime.model_name, __version__, vllm.__version__, *built, text_pipeline_name()).set(
            1
        )
        state.openai_serving_models.registry = AliasedModels(state.openai_serving_models, policies.presets)
        state.openai_serving_chat = PruningServingChat.take_over(
            state.openai_serving_chat,
            processor=processor,
            runtime=runtime,
            policies=policies,
            trust_request_mm_kwargs=args.trust_request_mm_kwargs,
        )
        notice_shutdown(state, engine_client)
        state.pruning_shutdown = asyncio.create_task(fail_unfinished_requests(state, engine_client))

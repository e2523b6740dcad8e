"""The `vllm.endpoint_plugins` entry point: puts our chat completions in the place of vLLM's."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion import api_router as stock
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from server import media  # noqa: F401  (registers the media connector)
from server.protocol import PruningChatCompletionRequest
from server.serving import PruningServingChat
from server.validation import ReadableErrors
from vllm_vtprune.plugin.processor import PruningProcessor

router = APIRouter(route_class=ReadableErrors)


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"content": {"text/event-stream": {}}},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse},
        500: {"model": ErrorResponse},
        501: {"model": ErrorResponse},
    },
)
async def create_chat_completion(request: PruningChatCompletionRequest, raw_request: Request) -> Any:
    """Chat completions as vLLM serves them, with the `pruning` field in requests and responses."""
    return await stock.create_chat_completion(request, raw_request)


class ServerPlugin:
    """Loaded by vLLM in each API-server process when ``VLLM_PLUGINS`` names ``vtprune``."""

    name = "vtprune"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Load the tower and take over the chat handler; the server is not healthy before this returns.

        Raises:
            RuntimeError: the model would be served unpruned.
            TowerError: the weights of the vision tower are not there or do not fit.
        """
        assert engine_client is not None  # the render server has none, and does not run the generate task
        processor = engine_client.renderer.mm_processor
        if not isinstance(processor, PruningProcessor):
            raise RuntimeError(
                f"the multimodal processor of {args.model} is {type(processor).__name__}, which cannot prune: "
                "expected a model that vtprune supports, with its general plugin loaded"
            )
        processor.runtime.warm_up()
        state.openai_serving_chat = PruningServingChat.take_over(
            state.openai_serving_chat,
            processor=processor,
            default=getattr(args, "pruning_default", None),
            trust_request_mm_kwargs=args.trust_request_mm_kwargs,
        )

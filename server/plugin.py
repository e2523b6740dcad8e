"""The `vllm.endpoint_plugins` entry point: replaces vLLM's routes and handlers for conversations by ours."""

from __future__ import annotations

import asyncio
from argparse import Namespace

import vllm
from fastapi import FastAPI
from starlette.datastructures import State
from starlette.types import ASGIApp
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

from vllm_vtprune import __version__, metrics
from vllm_vtprune.plugin.compat import api_process
from vllm_vtprune.plugin.compat.server import replace_registry
from vllm_vtprune.plugin.encoder_client import EncoderClient, socket_of
from vllm_vtprune.plugin.gpu import encoder_labels
from vllm_vtprune.plugin.image import warm_up
from vllm_vtprune.plugin.placement import role_of
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.unpruned import UnprunedProcessor, runtime_without_encoder
from vllm_vtprune.text import text_pipeline_name
from vllm_vtprune_server import media  # noqa: F401  (registers the media connector)
from vllm_vtprune_server.aliases import AliasedModels
from vllm_vtprune_server.elsewhere import MisplacedPolicyMiddleware, json_routes
from vllm_vtprune_server.messages import PruningServingMessages
from vllm_vtprune_server.outcome import PRUNING, OutcomeMiddleware
from vllm_vtprune_server.playground import router as playground_router
from vllm_vtprune_server.policies import Policies
from vllm_vtprune_server.ready import say_when_ready
from vllm_vtprune_server.rendering import PruningRenderer
from vllm_vtprune_server.responses import PruningServingResponses
from vllm_vtprune_server.route import ErrorShapeMiddleware
from vllm_vtprune_server.routes import REQUESTS, messages_router, resets, router
from vllm_vtprune_server.schema import describe_document
from vllm_vtprune_server.sender_cache import resend_unsent_images
from vllm_vtprune_server.serving import Prunes, PruningServingBatch, PruningServingChat
from vllm_vtprune_server.shutdown import fail_unfinished_requests, watch_shutdown

logger = init_logger("vllm.vtprune")

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
            EncoderError: the weights of the vision encoder are missing or do not fit, or its process did not start.
        """
        assert engine_client is not None  # the render server has none, and does not run the generate task
        mm_processor = engine_client.renderer.mm_processor
        config = engine_client.vllm_config
        encodes_only = config.is_mm_encoder_only and config.ec_transfer_config is None
        processor = mm_processor if isinstance(mm_processor, PruningProcessor) and not encodes_only else None
        reason = "this instance encodes only (mm_encoder_only)" if encodes_only else type(mm_processor).__name__
        policies = Policies.of_options(args, config.kv_transfer_config)
        placement = "none"
        encoder: tuple[str, str, str] = ("none", "none", "none")
        if processor is not None:
            processor.use_engine(config)
            placement = str(processor.engine_placement.choice)
            placements = policies.placements(processor)
            if config.parallel_config.data_parallel_size_local == 0:
                logger.warning("No engine runs on this machine: restart this process after an engine reloads weights")
            runtime = processor.runtime
            if processor.engine_placement.choice != "engine":
                encoder = encoder_labels(processor.model_config, processor.engine)
                _, device, _ = encoder
                path = socket_of(device)
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
            runtime = mm_processor.runtime if has_runtime else runtime_without_encoder(engine_client.model_config)
        runtime.clients_write_prompts = True
        metrics.start(runtime.model_name, policies.available)
        labels = (__version__, vllm.__version__, placement, *encoder, text_pipeline_name())
        metrics.BUILD_INFO.labels(runtime.model_name, *labels).set(1)
        models = state.openai_serving_models
        replace_registry(models, AliasedModels(models, policies.available))
        renderer = PruningRenderer.take_over(
            state.online_renderer, processor=processor, runtime=runtime, policies=policies
        )
        renderer.role = role_of(config.ec_transfer_config)
        for name, handler in HANDLERS.items():
            setattr(state, name, handler.take_over(getattr(state, name), renderer))
        watch_outcomes(self._app, runtime.model_name)
        if getattr(args, "pruning_playground", False):
            self._app.include_router(playground_router)
        resend_unsent_images(engine_client)
        watch_shutdown(state, engine_client)
        state.pruning_shutdown = asyncio.create_task(fail_unfinished_requests(state, engine_client))
        if api_process(config.parallel_config)[0] == 0:
            name = models.base_model_paths[0].name
            ready = say_when_ready(args, name, policies, prunes=processor is not None)
            state.pruning_ready = asyncio.create_task(ready)


def watch_outcomes(app: FastAPI, model_name: str) -> None:
    """Wrap the app's middleware stack in ours, now and whenever the stack is built anew, as by Ray Serve.

    A stack that vLLM has built is kept: in a second one, the counter of HTTP requests fails to register its metrics.
    """
    build = app.build_middleware_stack

    def watched(stack: ASGIApp) -> ASGIApp:
        return OutcomeMiddleware(ErrorShapeMiddleware(stack), model_name)

    app.middleware_stack = watched(app.middleware_stack or build())
    app.build_middleware_stack = lambda: watched(build())  # type: ignore[method-assign]

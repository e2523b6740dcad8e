"""The chat endpoint in this process over an engine that says one word: what is refused before any engine sees it."""

from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.api_router import router as models_router
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.plugins import load_general_plugins
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer

from vllm_vtprune.plugin.placement import role_of
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.unpruned import runtime_without_encoder
from vllm_vtprune_server import media
from vllm_vtprune_server.aliases import AliasedModels
from vllm_vtprune_server.outcome import OutcomeMiddleware
from vllm_vtprune_server.plugin import HANDLERS
from vllm_vtprune_server.policies import Policies, fixed_counts
from vllm_vtprune_server.rendering import PruningRenderer
from vllm_vtprune_server.routes import messages_router, router

NAME = "model"


@dataclass(frozen=True)
class Endpoint:
    """Answers a request that may reach the engine with one word, at once."""

    client: TestClient
    processor: Any = None
    prompts: list[dict[str, Any]] = field(default_factory=list)
    """What reached the engine."""

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
        return self.client.post(path, json={"model": NAME, "max_tokens": 1, **body})

    def error(self, body: dict[str, Any]) -> dict[str, Any]:
        """The error of a request that has to be refused."""
        response = self.post(body)
        assert response.status_code == 400, response.text
        error: dict[str, Any] = response.json()["error"]
        return error


@contextmanager
def endpoint(
    checkpoint: Path, *, names: tuple[str, ...] = (NAME,), trust_request_mm_kwargs: bool = False, **options: Any
) -> Iterator[Endpoint]:
    """The plugin's routes and handler over vLLM's own renderer; requests without a policy keep 8 tokens.

    Args:
        checkpoint: of the model.
        names: under which it is served.
        trust_request_mm_kwargs: as the option of `vllm serve`.
        options: of the engine.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MEDIA_CONNECTOR", media.NAME)
        load_general_plugins()
        args = EngineArgs(model=str(checkpoint), enforce_eager=True, **{"max_model_len": 2048, **options})
        config = args.create_engine_config()
        engine: Any = SimpleNamespace(
            model_config=config.model_config,
            vllm_config=config,
            renderer=renderer_from_config(config),
            input_processor=None,
            errored=False,
            check_admission=lambda requests: None,
        )
        app = _app(engine, names, trust_request_mm_kwargs)
        with TestClient(app, raise_server_exceptions=False) as client:
            served = Endpoint(client, engine.renderer.mm_processor)
            engine.generate = partial(_generate, served.prompts)
            yield served


def _app(engine: Any, names: tuple[str, ...], trust_request_mm_kwargs: bool) -> FastAPI:
    settings: Any = {
        "request_logger": None,
        "chat_template": None,
        "chat_template_content_format": "auto",
    }
    online_renderer = OnlineRenderer(
        engine.model_config, engine.renderer, **settings, trust_request_mm_kwargs=trust_request_mm_kwargs
    )
    models = OpenAIServingModels(engine, [BaseModelPath(name, name) for name in names])
    processor = engine.renderer.mm_processor
    role = role_of(engine.vllm_config.ec_transfer_config)
    if role is not None:
        processor.use_engine(engine.vllm_config)
    policies = Policies.of({"budget": {"type": "tokens", "keep": 8}}, None, fixed_counts=fixed_counts())
    models.registry = AliasedModels(models, policies.available)

    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    app.state.openai_serving_models = models
    renderer = PruningRenderer.take_over(
        online_renderer,
        processor=processor if isinstance(processor, PruningProcessor) else None,
        runtime=processor.runtime if hasattr(processor, "runtime") else runtime_without_encoder(engine.model_config),
        policies=policies,
    )
    renderer.role = role
    chat: Any = {"response_role": "assistant", "online_renderer": online_renderer, **settings}
    stock = {
        "openai_serving_chat": OpenAIServingChat(engine, models, **chat),
        "openai_serving_chat_batch": OpenAIServingChatBatch(engine, models, **chat),
        "openai_serving_responses": OpenAIServingResponses(engine, models, online_renderer, **settings),
        "anthropic_serving_messages": AnthropicServingMessages(engine, models, **chat),
    }
    for name, handler in HANDLERS.items():
        setattr(app.state, name, handler.take_over(stock[name], renderer))
    init_exception_handler(app)
    app.include_router(router)
    app.include_router(messages_router)
    app.include_router(models_router)
    app.add_middleware(OutcomeMiddleware, model_name=NAME)
    return app


async def _generate(
    prompts: list[Any], prompt: Any, params: Any, request_id: str, **options: Any
) -> AsyncIterator[RequestOutput]:
    prompts.append(prompt)
    completion = CompletionOutput(0, "yes", [5], None, None, finish_reason="stop")
    yield RequestOutput(request_id, None, prompt["prompt_token_ids"], None, [completion], finished=True)

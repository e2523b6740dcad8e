"""An API server in this process, whose engine core says one word: what is refused before any engine sees it."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor

from vllm_vtprune_server import media, shutdown

NAME = "model"
TASKS = ("generate",)
WORD = 5
"""The token that answers every request."""
EIGHT = {"budget": {"type": "tokens", "keep": 8}}


@dataclass(frozen=True)
class Endpoint:
    """Answers a request that may reach the engine with one word, at once."""

    client: TestClient
    processor: Any = None
    requests: list[EngineCoreRequest] = field(default_factory=list)
    """What reached the engine."""

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
        return self.client.post(path, json={"model": NAME, "max_tokens": 1, **body})

    def error(self, body: dict[str, Any]) -> dict[str, Any]:
        """The error of a request that has to be refused."""
        response = self.post(body)
        assert response.status_code == 400, response.text
        error: dict[str, Any] = response.json()["error"]
        return error


class EngineCore:
    """In the place of the client of an engine process."""

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    def __init__(self) -> None:
        self.requests: list[EngineCoreRequest] = []
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return TASKS

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.requests.append(request)
        answer = EngineCoreOutput(request.request_id, [WORD], finish_reason=FinishReason.LENGTH)
        await self._outputs.put(EngineCoreOutputs(outputs=[answer]))

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        pass

    def shutdown(self, timeout: float | None = None) -> None:
        pass


@contextmanager
def endpoint(
    checkpoint: Path,
    *,
    names: tuple[str, ...] = (NAME,),
    default: object = EIGHT,
    trust_request_mm_kwargs: bool = False,
    **options: Any,
) -> Iterator[Endpoint]:
    """vLLM's own server with the plugin.

    Args:
        checkpoint: of the model.
        names: under which it is served.
        default: policy of requests without one.
        trust_request_mm_kwargs: as the option of `vllm serve`.
        options: of the engine.
    """
    core = EngineCore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MEDIA_CONNECTOR", media.NAME)
        patch.setenv("VLLM_PLUGINS", "vtprune")
        patch.setattr(EngineCoreClient, "make_async_mp_client", lambda **_: core)
        load_general_plugins()
        engine_args = EngineArgs(model=str(checkpoint), enforce_eager=True, **{"max_model_len": 2048, **options})
        config = engine_args.create_engine_config()
        engine = AsyncLLM(config, Executor.get_class(config), log_stats=False)
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        args.model, args.served_model_name = str(checkpoint), list(names)
        args.trust_request_mm_kwargs, args.disable_log_stats = trust_request_mm_kwargs, True
        args.pruning_default = default
        args.uds = "in this process"  # no port is awaited
        app = build_app(args, TASKS, config.model_config)
        app.state.log_stats = False
        try:
            with TestClient(app, raise_server_exceptions=False) as client:
                assert client.portal is not None
                client.portal.call(init_app_state, engine, app.state, args, TASKS)
                yield Endpoint(client, engine.renderer.mm_processor, core.requests)
        finally:
            engine.shutdown()
            shutdown.stopping.clear()
            gc.unfreeze()  # what vLLM's server froze when it started

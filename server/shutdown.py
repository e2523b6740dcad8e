"""Server shutdown: unfinished requests get an error, and the engine's death counts as a failure."""

from __future__ import annotations

import asyncio
import threading
from http import HTTPStatus

from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError
from vllm.outputs import RequestOutput

from vllm_vtprune.plugin.compat import server as compat

POLL = 0.1  # seconds

engine_died = threading.Event()
"""Set when this process's server shuts down because its engine died."""

stopping = threading.Event()
"""Set when this process's server begins to shut down, before its engine."""


class ServerStopping(GracefulHTTPError):
    """The server shuts down before the request is finished."""

    def __init__(self) -> None:
        super().__init__(
            "The server is shutting down and did not finish this request; send it again.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


async def fail_unfinished_requests(state: State, engine_client: EngineClient) -> None:
    """Fail the requests that are unfinished at the end of ``--shutdown-timeout``.

    A stream gets an error event and ``[DONE]``; other requests get status 503.
    """
    while not compat.engine_client_is_stopped(state):
        await asyncio.sleep(POLL)
    compat.fail_unfinished_requests(engine_client, ServerStopping())


def watch_shutdown(state: State, engine_client: EngineClient) -> None:
    """Set `stopping` when the server begins to shut down, and `engine_died` if no stop signal caused it."""

    def on_shutdown() -> None:
        stopping.set()
        if compat.engine_client_is_stopped(state):
            engine_died.set()

    compat.before_shutdown(engine_client, on_shutdown)


def failed_by_shutdown(error: Exception) -> bool:
    """Whether a request failed because the renderer had been shut down.

    vLLM would answer with status 500 (v1/engine/async_llm.py shuts the renderer down first).
    """
    return isinstance(error, RuntimeError) and stopping.is_set()


async def aborted_by_shutdown(result: RequestOutput) -> bool:
    """Whether the engine aborted a request because the server shuts down; not by ``/pause``.

    A stopping engine aborts late requests, and without ``--shutdown-timeout`` all of them. The stock server returns
    their partial answers as if they were complete.
    """
    if not any(output.finish_reason == "abort" for output in result.outputs):
        return False
    if not stopping.is_set():  # Ctrl-C reaches the engine as soon as the server
        await asyncio.sleep(POLL)
    return stopping.is_set()

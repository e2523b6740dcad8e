"""When the server stops: what cannot be finished is answered with an error, and a death of the engine is a failure."""

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
"""Set when this process's server has ended by itself, which it does when its engine died."""

stopping = threading.Event()
"""Set when this process's server begins to stop, before its engine is told."""


class ServerStopping(GracefulHTTPError):
    """The server stops before the request is finished, or before it is begun."""

    def __init__(self) -> None:
        super().__init__(
            "The server is shutting down and did not finish this request; send it again.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


async def fail_unfinished_requests(state: State, engine_client: EngineClient) -> None:
    """Wait for the end of the server's time to finish requests (``--shutdown-timeout``), then fail those that are left.

    A stream gets an error event and ``[DONE]``, a whole answer status 503.

    Args:
        state: of the app.
        engine_client: of the same API process.
    """
    while not compat.engine_client_is_stopped(state):
        await asyncio.sleep(POLL)
    compat.fail_unfinished_requests(engine_client, ServerStopping())


def notice_shutdown(state: State, engine_client: EngineClient) -> None:
    """Have `stopping` set where the server begins to stop, and `engine_died` where it was not told to.

    Args:
        state: of the app.
        engine_client: of the same API process.
    """

    def look() -> None:
        stopping.set()
        if compat.engine_client_is_stopped(state):
            engine_died.set()

    compat.before_shutdown(engine_client, look)


def came_too_late(error: Exception) -> bool:
    """Whether a request failed because the server had begun to stop, and with it the threads that render.

    vLLM would answer with status 500 (v1/engine/async_llm.py shuts the renderer down first).
    """
    return isinstance(error, RuntimeError) and stopping.is_set()


async def was_cut_short(result: RequestOutput) -> bool:
    """Whether the engine gave a request up because the server stops.

    An engine that stops aborts requests that come too late for it, and without ``--shutdown-timeout`` all of them; the
    stock server passes such an answer on as if it were whole. Requests that ``/pause`` aborts are not meant here.
    """
    if not any(output.finish_reason == "abort" for output in result.outputs):
        return False
    if not stopping.is_set():  # Ctrl-C reaches the engine as soon as the server
        await asyncio.sleep(POLL)
    return stopping.is_set()

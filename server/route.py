"""The route class of our endpoints: errors of a client's making are answered readably, refusals are counted."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.logger import init_logger

from vllm_vtprune import metrics
from vllm_vtprune_server.validation import explain

logger = init_logger("vllm.vtprune")

REACHED_HANDLER = "vtprune_reached_handler"
"""The name in a request's state that says that its body was valid and its trace counts what becomes of it."""


class PruningRoute(APIRoute):
    """A route whose errors of a client's making are answered readably and briefly, and counted by their reason."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_readably(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                answer = explain(error)
                count(request, answer)
                if answer is None:
                    raise
                if request.app.state.args.log_error_stack:
                    logger.exception("A request was refused")
                return JSONResponse(answer.model_dump(), status_code=answer.error.code)

        return handle_readably


def count(request: Request, answer: ErrorResponse | None) -> None:
    """Count a request that was answered with an error.

    Args:
        request: as it came.
        answer: to the client; None where the client is not to blame.
    """
    model_name = request.app.state.openai_serving_chat.runtime.model_name
    if not hasattr(request.state, REACHED_HANDLER):
        metrics.REQUESTS.labels(model_name, "failed" if answer is None else "refused").inc()
    reason = None if answer is None else refusal_reason(answer.error.param)
    if reason is not None:
        metrics.ERRORS.labels(model_name, reason).inc()


def refusal_reason(param: str | None) -> metrics.RefusalReason | None:
    """Which part of a request was refused, as far as it is ours.

    Args:
        param: the path of the field, such as ``messages.0.content.1.pruning.budget``.

    Returns:
        ``policy``, ``image``, or None for the rest, which stock vLLM would refuse too.
    """
    keys = (param or "").split(".")
    if "pruning" in keys:
        return "policy"
    return "image" if "image_url" in keys else None

"""The route class of our endpoints: explains client errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from vllm.entrypoints.anthropic.api_router import translate_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.logger import init_logger

from vllm_vtprune_server.validation import bounded, explain

logger = init_logger("vllm.vtprune")


class PruningRoute(APIRoute):
    """A route that answers client errors with short, readable messages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_readably(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                answer = self.answer(error)
                if answer is None:
                    raise
                return answer

        return handle_readably

    def answer(self, error: Exception) -> JSONResponse | None:
        """The response to an error; None for an error of the server, which vLLM answers."""
        explained = explain(error)
        return None if explained is None else JSONResponse(explained.model_dump(), status_code=explained.error.code)


class MessagesRoute(PruningRoute):
    """A route whose errors have Anthropic's shape, also those of the server."""

    def answer(self, error: Exception) -> JSONResponse | None:
        explained = explain(error)
        if explained is None:
            logger.error("An error of the server at %s", self.path, exc_info=error)
            explained = bounded(create_error_response(error))
        return anthropic_error(explained)


def anthropic_error(answer: ErrorResponse) -> JSONResponse:
    """The response with an error in Anthropic's shape, plus the path of the field."""
    response = translate_error_response(answer)
    if answer.error.param is None:
        return response
    content = json.loads(bytes(response.body))
    content["error"]["param"] = answer.error.param
    return JSONResponse(content, status_code=response.status_code)

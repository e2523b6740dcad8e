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

from vllm_vtprune_server.validation import explain


class PruningRoute(APIRoute):
    """A route that answers client errors with short, readable messages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_readably(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                answer = explain(error)
                if answer is None:
                    raise
                return self.refusal(answer)

        return handle_readably

    def refusal(self, answer: ErrorResponse) -> JSONResponse:
        """The response with an error."""
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)


class MessagesRoute(PruningRoute):
    """A route whose errors have Anthropic's shape."""

    def refusal(self, answer: ErrorResponse) -> JSONResponse:
        return anthropic_error(answer)


def anthropic_error(answer: ErrorResponse) -> JSONResponse:
    """The response with an error in Anthropic's shape, plus the path of the field."""
    response = translate_error_response(answer)
    if answer.error.param is None:
        return response
    content = json.loads(bytes(response.body))
    content["error"]["param"] = answer.error.param
    return JSONResponse(content, status_code=response.status_code)

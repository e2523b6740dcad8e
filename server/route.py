"""The route class of our endpoints: explains client errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

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
                return JSONResponse(answer.model_dump(), status_code=answer.error.code)

        return handle_readably

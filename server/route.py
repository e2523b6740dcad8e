"""How errors of our endpoints, and of the server around them, are answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.logger import init_logger

from vllm_vtprune_server.outcome import MESSAGES_ROUTE, path_of
from vllm_vtprune_server.validation import bounded, explain

logger = init_logger("vllm.vtprune")

ANTHROPIC_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}
"""Status -> Anthropic's type of the error; others are ``invalid_request_error`` or, from 500 on, ``api_error``.

Source: https://docs.anthropic.com/en/api/errors
"""


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
        return JSONResponse(anthropic_error(explained), status_code=explained.error.code)


def anthropic_error(answer: ErrorResponse) -> dict[str, Any]:
    """An error in Anthropic's shape, plus the path of the field."""
    error = answer.error
    other = "invalid_request_error" if error.code < HTTPStatus.INTERNAL_SERVER_ERROR else "api_error"
    described = {"type": ANTHROPIC_TYPES.get(HTTPStatus(error.code), other), "message": error.message}
    return {"type": "error", "error": described if error.param is None else {**described, "param": error.param}}


class ErrorShapeMiddleware:
    """Pure ASGI middleware: gives the API's shape to errors of the server around the endpoints.

    vLLM answers a wrong key, and Starlette an unknown route or method, with JSON of a shape of its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def shaped_send(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_bare_status(message):
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    body = _shaped(scope, start, body)
                    MutableHeaders(raw=start["headers"])["content-length"] = str(len(body))
                    await send(start)
                    await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, shaped_send)


def _is_bare_status(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    is_plain = "content-encoding" not in headers
    bare = (HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
    return start["status"] in bare and is_plain and headers.get("content-type", "").startswith("application/json")


def _shaped(scope: Scope, start: Message, body: bytes) -> bytes:
    """The body of an error in the API's shape; unchanged if it has one."""
    try:
        content = json.loads(body)
    except ValueError:
        return body
    if not isinstance(content, dict) or isinstance(content.get("error"), dict):
        return body
    path = path_of(scope)
    error = _bare_error(start["status"], scope["method"], path, Headers(raw=start["headers"]).get("allow"))
    answer = bounded(ErrorResponse(error=error))
    is_anthropic = path == MESSAGES_ROUTE or path.startswith(f"{MESSAGES_ROUTE}/")
    return json.dumps(anthropic_error(answer) if is_anthropic else answer.model_dump()).encode()


def _bare_error(status: int, method: str, path: str, allowed: str | None) -> ErrorInfo:
    if status == HTTPStatus.UNAUTHORIZED:
        message = (
            "Authorization: no valid key; expected the header `Authorization: Bearer KEY` with a key of this server."
        )
        return ErrorInfo(message=message, type="AuthenticationError", code=status)
    if status == HTTPStatus.NOT_FOUND:
        message = f"{path}: no such route; expected one of those in /openapi.json."
        return ErrorInfo(message=message, type="NotFoundError", code=status)
    message = f"{path}: {method} is not accepted; expected {allowed or 'another method'}."
    return ErrorInfo(message=message, type="MethodNotAllowedError", code=status)

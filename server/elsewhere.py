"""Reject policies sent to vLLM routes that do not prune, because vLLM ignores unknown fields."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from vllm_vtprune_server.content import URL_KEYS, resembles_pruning
from vllm_vtprune_server.outcome import ROUTE, path_of
from vllm_vtprune_server.trace import Refusal

KEY = "pruning"
MAY_HOLD_POLICY = re.compile(rb"(?i)prun|\\u|\x00")
"""Bodies that need parsing: with the key, with escapes, or in UTF-16 or UTF-32."""
CONVERSATIONS = ("messages", "input")
"""Fields of a body that hold messages or lists of messages."""


def json_routes(app: FastAPI) -> set[str]:
    """Paths of an app's routes that accept JSON: with a FastAPI body, or with vLLM's own check."""
    return {route.path for route in app.routes if isinstance(route, APIRoute) and _takes_json(route)}


def _takes_json(route: APIRoute) -> bool:
    checks = [dependency.dependency for dependency in route.dependencies]
    return "POST" in route.methods and (route.body_field is not None or validate_json_request in checks)


class MisplacedPolicyMiddleware:
    """Pure ASGI middleware that rejects a policy in a request to a route that would ignore it.

    Args:
        app: the next app.
        routes: paths of the routes that do not prune.
    """

    def __init__(self, app: ASGIApp, routes: Collection[str]) -> None:
        self.app = app
        self.routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) not in self.routes:
            await self.app(scope, receive, send)
            return
        if Headers(scope=scope).get("content-type", "").startswith("multipart/"):  # files, not JSON
            await self.app(scope, receive, send)
            return
        messages = await _messages_of_body(receive)
        body = b"".join(message.get("body", b"") for message in messages)
        param = misplaced_policy(body) if MAY_HOLD_POLICY.search(body) else None
        if param is not None:
            await _refusal(path_of(scope), param)(scope, receive, send)
            return
        del body
        unread = iter(messages)

        async def receive_again() -> Message:
            return next(unread, None) or await receive()

        await self.app(scope, receive_again, send)


async def _messages_of_body(receive: Receive) -> list[Message]:
    """All messages of a request's body, or until the client disconnects."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def misplaced_policy(body: bytes) -> str | None:
    """Path of the first policy in a JSON body; None if there is none. ``null`` is no policy.

    Searches the fields where the routes that prune read policies, and ``mm_processor_kwargs``; not tool schemas,
    which may use any name.
    """
    try:
        data = json.loads(body)
        return next(_policies(data), None) if isinstance(data, Mapping) else None
    except (ValueError, RecursionError):  # reported by the route
        return None


def _policies(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (key for key, value in data.items() if value is not None and resembles_pruning(key))
    kwargs = data.get("mm_processor_kwargs")
    if isinstance(kwargs, Mapping) and kwargs.get(KEY) is not None:
        yield f"mm_processor_kwargs.{KEY}"
    for name in CONVERSATIONS:
        yield from _policies_of_parts(data.get(name), name)
    extra = data.get("extra_body")
    if isinstance(extra, Mapping):
        yield from (f"extra_body.{key}" for key in extra if resembles_pruning(key))


def _policies_of_parts(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _policies_of_parts(item, f"{path}.{index}")
    elif isinstance(value, Mapping):
        yield from (f"{path}.{key}" for key, inner in value.items() if inner is not None and resembles_pruning(key))
        for name in ("content", *URL_KEYS):
            yield from _policies_of_parts(value.get(name), f"{path}.{name}")


def _refusal(route: str, param: str) -> JSONResponse:
    message = f"{param}: {route} does not prune; expected a request to {ROUTE}, or no policy."
    error = ErrorInfo(message=message, type="BadRequestError", param=param, code=400)
    Refusal(route, error.code, error.type, param).log()
    return JSONResponse(ErrorResponse(error=error).model_dump(), status_code=error.code)

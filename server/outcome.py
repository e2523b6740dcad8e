"""Determine the outcome of a request that is pruned from the response that was sent.

Covers every source of a response: our route, vLLM's handler, its API key check, an operator's middleware. The outcome
follows from status, error event, and whether the client disconnected.
"""

from __future__ import annotations

import asyncio
import json
import re
from http.client import responses
from typing import Any

from opentelemetry.trace import use_span
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_vtprune import metrics
from vllm_vtprune_server.trace import Refusal, Trace
from vllm_vtprune_server.tracing import start_request_span

ROUTE = "/v1/chat/completions"
BATCH_ROUTE = "/v1/chat/completions/batch"
RESPONSES_ROUTE = "/v1/responses"
MESSAGES_ROUTE = "/v1/messages"
COUNT_ROUTE = "/v1/messages/count_tokens"
ANSWERING = frozenset({ROUTE, BATCH_ROUTE, RESPONSES_ROUTE, MESSAGES_ROUTE})
"""Routes that prune and answer; their requests are counted."""
PRUNING = ANSWERING | {COUNT_ROUTE}
"""Routes that prune."""
TRACE = "vtprune_trace"
"""Key of the `Trace` in a request's state."""

MAX_ERROR = 64 * 1024
"""Most bytes of an error that are parsed."""

# Line breaks inside JSON strings are escaped, so generated text cannot begin a line.
_ERROR_EVENT = re.compile(rb'^(?:event: error\ndata: (?=\{)|data: (?=\{"error":))(.*)$', re.MULTILINE)
_DONE_EVENT = re.compile(
    rb"^data: \[DONE\]|^event: (?:response\.(?:completed|incomplete)|message_stop|error)$", re.MULTILINE
)


class Answer:
    """The state of one response while it is sent.

    Args:
        route: path of its route.

    Attributes:
        abandoned: the client disconnected before it was complete.
        complete: its outcome can no longer change.
    """

    def __init__(self, route: str) -> None:
        self.route = route
        self.abandoned = False
        self.complete = False
        self._status = 0
        self._is_stream = False
        self._error = b""

    def observe(self, message: Message) -> None:
        """Read a message, without changing it."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            self._status = message["status"]
            # a body compressed by an operator's middleware cannot be read: only its status counts
            is_plain = "content-encoding" not in headers
            self._is_stream = is_plain and headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self._is_stream:
                if event := _ERROR_EVENT.search(body):
                    self._error = event[1]
                self.complete |= _DONE_EVENT.search(body) is not None
            else:
                if self._status >= 400 and len(self._error) < MAX_ERROR:
                    self._error += body
                self.complete |= not message.get("more_body", False)

    @property
    def outcome(self) -> metrics.Outcome:
        """The outcome if nothing more is sent."""
        if self.abandoned:
            return "aborted"
        if not self.complete:
            return "failed"
        code = self._code()
        return "finished" if code < 400 else "refused" if code < 500 else "failed"

    @property
    def refusal(self) -> Refusal | None:
        """The refusal; None for any other outcome."""
        if self.outcome != "refused":
            return None
        code, error = self._code(), self._read_error()
        kind, param = error.get("type") or responses.get(code, ""), error.get("param")
        return Refusal(self.route, code, str(kind), None if param is None else str(param))

    def _code(self) -> int:
        code = self._read_error().get("code") if self._is_stream else None
        return code if isinstance(code, int) else 500 if self._is_stream and self._error else self._status

    def _read_error(self) -> dict[str, Any]:
        try:
            body = json.loads(self._error)
            error = body.get("error", body)
        except (ValueError, AttributeError):
            return {}
        return error if isinstance(error, dict) else {}


class OutcomeMiddleware:
    """Pure ASGI middleware: gives each request to be pruned and answered a `Trace`, finished with the outcome.

    Args:
        app: the next app.
        model_name: label of the metrics.
    """

    def __init__(self, app: ASGIApp, model_name: str) -> None:
        self.app = app
        self.model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = path_of(scope) if scope["type"] == "http" and scope["method"] == "POST" else ""
        if route not in ANSWERING:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = None if route == RESPONSES_ROUTE else headers.get("x-request-id")
        trace = Trace(request_id=None if request_id is None else f"chatcmpl-{request_id}")
        scope.setdefault("state", {})[TRACE] = trace
        start_request_span(trace, headers)
        answer = Answer(route)

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not answer.complete:
                answer.abandoned = True
            return message

        async def watched_send(message: Message) -> None:
            answer.observe(message)
            if answer.complete:  # count before the client receives it
                self._finish(trace, answer)
            await send(message)

        try:
            with use_span(trace.span, record_exception=False, set_status_on_exception=False):
                await self.app(scope, watched_receive, watched_send)
        except asyncio.CancelledError:
            answer.abandoned = True
            raise
        finally:
            self._finish(trace, answer)

    def _finish(self, trace: Trace, answer: Answer) -> None:
        trace.finish(answer.outcome, self.model_name, answer.refusal)


def path_of(scope: Scope) -> str:
    """The path of a request below ``--root-path``."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))

"""The outcome of a chat completion is that of the answer which its client was sent."""

import asyncio
import json
import logging
from collections.abc import Iterator
from itertools import count
from typing import Any, get_args

import pytest
from prometheus_client import REGISTRY
from starlette.types import Message, Receive, Scope, Send

from tests.support.logs import records_of
from vllm_vtprune import metrics
from vllm_vtprune_server.outcome import ANSWERING, ROUTE, TRACE, OutcomeMiddleware
from vllm_vtprune_server.trace import Trace, logger

_names = count()

LEFT: Message = {"type": "http.disconnect"}
TOKEN = 'data: {"id":"1","choices":[{"delta":{"content":"a"}}]}\n\n'
TALKS_OF_ERRORS = 'data: {"id":"1","choices":[{"delta":{"content":"\\ndata: {\\"error\\": 1}\\ndata: [DONE]"}}]}\n\n'
DONE = "data: [DONE]\n\n"


def error(code: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": "the client's words", "type": f"Type{code}", "param": param, "code": code}}


def whole(status: int, body: object = None, **headers: str) -> list[Message]:
    return [begin(status, "application/json", **headers), part(json.dumps(body), last=True)]


def stream(*events: str | dict[str, Any], ended: bool = True) -> list[Message]:
    texts = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
    return [begin(200, "text/event-stream; charset=utf-8"), *map(part, texts), *([part("", last=True)] * ended)]


def begin(status: int, content_type: str, **headers: str) -> Message:
    named = {"content-type": content_type, **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def part(text: str, last: bool = False) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": not last}


class Run:
    """One request through the middleware.

    Args:
        script: what the app does: messages that it sends; `LEFT` is one that it receives; an error it raises.
    """

    def __init__(self, *script: Message | BaseException, path: str = ROUTE, headers: Any = ()) -> None:
        self.model = f"outcome-{next(_names)}"
        self.sent: list[Message] = []
        self.sent_when_counted: int | None = None
        self.trace: Trace | None = None
        self.raised: BaseException | None = None
        try:
            asyncio.run(self._run(script, path, list(headers)))
        except (Exception, asyncio.CancelledError) as raised:
            self.raised = raised

    async def _run(self, script: Any, path: str, headers: Any) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.trace = scope["state"].get(TRACE)
            for step in script:
                if isinstance(step, BaseException):
                    raise step
                await (receive() if step is LEFT else send(step))

        async def receive() -> Message:
            return LEFT

        async def send(message: Message) -> None:
            if self.sent_when_counted is None and self.outcomes:
                self.sent_when_counted = len(self.sent)
            self.sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "state": {}}
        await OutcomeMiddleware(app, self.model)(scope, receive, send)

    @property
    def outcomes(self) -> list[str]:
        """What the request was counted as."""
        counted = []
        for outcome in get_args(metrics.Outcome):
            labels = {"model_name": self.model, "outcome": outcome, "preset": "none"}
            counted += [outcome] * int(REGISTRY.get_sample_value("vtprune:requests_total", labels) or 0)
        return counted


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """What the log of requests gets."""
    with records_of(logger.name) as records:
        yield records


def named(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps({**data, 'type': name}, separators=(',', ':'))}\n\n"


DELTA = named("response.output_text.delta", delta="event: response.completed\nevent: error\ndata: {}")
BROKEN = 'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"no","code":%d}}\n\n'

ANSWERS: dict[str, tuple[list[Any], str]] = {
    "an answer": (whole(200, {"choices": []}), "finished"),
    "a refusal": (whole(400, error(400)), "refused"),
    "no key": (whole(401, {"error": "Unauthorized"}), "refused"),
    "a refusal that is no JSON": ([begin(413, "text/plain"), part("too large", last=True)], "refused"),
    "an error": (whole(500, error(500)), "failed"),
    "not now": (whole(503, error(503)), "failed"),
    "an exception": ([RuntimeError("of the handler")], "failed"),
    "an exception within a stream": ([*stream(TOKEN, ended=False), RuntimeError()], "failed"),
    "a stream": (stream(TOKEN, TOKEN, DONE), "finished"),
    "a stream that is not ended": (stream(TOKEN, DONE, ended=False), "finished"),
    "a stream of text that looks like an error": (stream(TALKS_OF_ERRORS, DONE), "finished"),
    "a stream without its end": (stream(TOKEN), "failed"),
    "an error event": (stream(TOKEN, error(500), DONE), "failed"),
    "an error event beside a token": (stream(TOKEN + f"data: {json.dumps(error(500))}\n\n" + DONE), "failed"),
    "an error event that cannot be read": (stream('data: {"error": {"code": 4\n\n', DONE), "failed"),
    "a refusal as an event": (stream(error(400), DONE), "refused"),
    "a stream that is compressed": (
        [begin(200, "text/event-stream", content_encoding="gzip"), part("\x1f"), part("", last=True)],
        "finished",
    ),
    "a response": (stream(DELTA, named("response.completed", response={})), "finished"),
    "a response that is cut off": (stream(DELTA, named("response.incomplete", response={})), "finished"),
    "a response without its end": (stream(DELTA), "failed"),
    "a response that fails": (stream(DELTA, named("error", code="InternalServerError", message="no")), "failed"),
    "a message": (stream(named("content_block_delta"), named("message_stop"), ended=False), "finished"),
    "a message without its end": (stream(named("content_block_delta")), "failed"),
    "a message that fails": (stream(named("content_block_delta"), BROKEN % 500), "failed"),
    "a message that is refused late": (stream(named("message_start"), BROKEN % 400), "refused"),
    "left before the answer": ([LEFT, *whole(200)], "aborted"),
    "left, and told that the body is broken": ([LEFT, *whole(400, error(400))], "aborted"),
    "left, and the handler was cancelled": ([LEFT, asyncio.CancelledError()], "aborted"),
    "cancelled": ([asyncio.CancelledError()], "aborted"),
    "left within a stream": ([*stream(TOKEN, ended=False), LEFT], "aborted"),
    "left after the end of a stream": ([*stream(TOKEN, DONE, ended=False), LEFT], "finished"),
    "left after the answer": ([*whole(200), LEFT], "finished"),
}


@pytest.mark.parametrize(("script", "outcome"), ANSWERS.values(), ids=ANSWERS.keys())
def test_it_is_counted_by_what_was_sent(script: list[Any], outcome: str) -> None:
    run = Run(*script)
    assert run.outcomes == [outcome]
    assert run.sent == [step for step in script if isinstance(step, dict) and step is not LEFT], "passed on as it was"
    assert run.raised is next((step for step in script if isinstance(step, BaseException)), None)


@pytest.mark.parametrize(
    ("script", "sent"), [(whole(200), 1), (whole(500, error(500)), 1), (stream(TOKEN, TOKEN, DONE), 3)]
)
def test_it_is_counted_before_the_client_has_the_end(script: list[Any], sent: int) -> None:
    assert Run(*script).sent_when_counted == sent


@pytest.mark.parametrize("path", sorted(ANSWERING))
def test_every_route_that_answers_is_counted(path: str, lines: list[logging.LogRecord]) -> None:
    assert Run(*whole(200), path=path).outcomes == ["finished"]
    assert Run(*whole(400, error(400)), path=path).outcomes == ["refused"]
    [line] = lines
    assert f"to {path} refused" in line.getMessage()


@pytest.mark.parametrize("path", ["/health", "/metrics", "/ping", "/v1/messages/count_tokens", "/v1/pruning"])
def test_other_routes_pass_untouched(path: str, lines: list[logging.LogRecord]) -> None:
    run = Run(*whole(400, error(400)), path=path)
    assert (run.outcomes, run.trace, len(run.sent), lines) == ([], None, 2, [])


REFUSALS: dict[str, tuple[list[Any], str, str | None]] = {
    "whole": (whole(400, error(400, "pruning.budget.keep")), "400 Type400, pruning.budget.keep", "policy"),
    "beside an image": (
        whole(400, error(400, "messages.0.content.1.image_url")),
        "400 Type400, messages.0.content.1.image_url",
        "image",
    ),
    "in place of an image": (
        whole(400, error(400, "messages.0.content.1.image_embeds")),
        "400 Type400, messages.0.content.1.image_embeds",
        "image",
    ),
    "event": (stream(error(400, "top_logprobs"), DONE), "400 Type400, top_logprobs", None),
    "about no field": (whole(404, error(404)), "404 Type404", None),
    "no key": (whole(401, {"error": "Unauthorized"}), "401 Unauthorized", None),
    "what names no field": (
        whole(400, error(400, "pruning.data:image/png;base64,AAAA.https://a/b.A secret")),
        "400 Type400, pruning.?.?.?",
        "policy",
    ),
}


@pytest.mark.parametrize(("script", "detail", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_one_line_without_the_client_s_words(
    script: list[Any], detail: str, reason: str | None, lines: list[logging.LogRecord]
) -> None:
    def refused() -> list[float]:
        labels = [{"model_name": run.model, "reason": name} for name in get_args(metrics.RefusalReason)]
        return [REGISTRY.get_sample_value("vtprune:errors_total", label) or 0 for label in labels]

    run = Run(*script, headers=[(b"x-request-id", b"mine")])
    [line] = lines
    assert line.levelno == logging.INFO
    assert line.getMessage() == f"Request chatcmpl-mine to {ROUTE} refused: {detail}"
    fields = line.pruning  # type: ignore[attr-defined]
    assert (fields["request_id"], fields["outcome"]) == ("chatcmpl-mine", "refused")
    assert " ".join([str(fields["code"]), fields["type"]]) == detail.split(",")[0]
    assert refused() == [float(reason == name) for name in get_args(metrics.RefusalReason)]


def test_what_is_answered_or_fails_is_no_refusal(lines: list[logging.LogRecord]) -> None:
    for script, outcome in ANSWERS.values():
        if outcome != "refused":
            Run(*script)
    assert lines == []

"""Sending one streamed chat completion and reading it to a record."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import httpx
from httpx_sse import EventSource

from loadtests.records import Record
from loadtests.sse import StreamReader, error_text

IDLE = 2.0  # seconds a connection may wait for the next request: less than the 5 after which vLLM's server closes it


class ServerMissing(Exception):
    """There is no server where one should be; the message says where and why."""


def connect(url: str, *, timeout: float) -> httpx.Client:
    """A client for one user.

    Args:
        url: of the server, without a path.
        timeout: seconds to wait for the next bytes before a request counts as failed.
    """
    limits = httpx.Limits(keepalive_expiry=IDLE)
    return httpx.Client(base_url=url, timeout=timeout, limits=limits, verify=_authorities())


@cache
def _authorities() -> ssl.SSLContext:
    """The certificates to trust: read once, which takes longer than many a request."""
    return httpx.create_ssl_context()


def served_model(url: str) -> str:
    """The name of the first model that the server lists.

    Raises:
        ServerMissing: no answer, or not that of an OpenAI-compatible server.
    """
    try:
        answer = httpx.get(f"{url}/v1/models", timeout=10)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerMissing(f"no server answers at {url}/v1/models: {error or type(error).__name__}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ServerMissing(f"{url}/v1/models does not list a model, as an OpenAI-compatible server would") from error


def ask(
    client: httpx.Client,
    name: str,
    body: Mapping[str, Any],
    due: float | None = None,
    path: str = "/v1/chat/completions",
) -> Record:
    """Send a completion and read its stream. Whatever goes wrong becomes the record's error.

    Args:
        client: from `connect`.
        name: the kind of request, for the record.
        body: the request without what makes it a stream with token counts, which is added.
        due: the time from which its times count, by `time.perf_counter`; None: when it is sent.
        path: of the endpoint. Of another than chat's, no text is read, hence no time to first token: look at `e2e`.
    """
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    sent = time.perf_counter()
    due = sent if due is None else due
    reader = StreamReader(name, started=wall_clock(due), due=due, sent=sent)
    error = None
    try:
        with client.stream("POST", path, json=request) as answer:
            if answer.status_code == 200:
                for event in EventSource(answer).iter_sse():
                    reader.take(event.data, time.perf_counter())
            else:
                error = _refusal(answer.status_code, answer.read())
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    return reader.finish(time.perf_counter(), error)


def wall_clock(moment: float) -> float:
    """A time of `time.perf_counter` in seconds since the epoch."""
    return time.time() - time.perf_counter() + moment


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"status {status}, {error_text(json.loads(body))}"
    except (ValueError, LookupError, TypeError):
        return f"status {status}, not an error in OpenAI's shape: {body[:200].decode(errors='replace')}"

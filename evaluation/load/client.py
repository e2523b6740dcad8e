"""Send one streamed chat completion and record it."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import httpx
from httpx_sse import EventSource

from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.sse import StreamReader, error_text

IDLE = 2.0  # seconds before an idle connection is closed; vLLM's server closes it after 5


class ServerMissing(Exception):
    """No server answers; the message names the URL and the problem."""


def connect(url: str, *, timeout: float) -> httpx.Client:
    """A client for one user.

    Args:
        url: URL of the server, without a path.
        timeout: seconds without a byte after which a request counts as failed.
    """
    limits = httpx.Limits(keepalive_expiry=IDLE)
    return httpx.Client(base_url=url, timeout=timeout, limits=limits, verify=_authorities())


@cache
def _authorities() -> ssl.SSLContext:
    """The trusted certificates; reading them takes longer than many requests, so cached."""
    return httpx.create_ssl_context()


def served_model(url: str) -> str:
    """The name of the first model that the server lists.

    Raises:
        ServerMissing: no answer, or not from an OpenAI-compatible server.
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
    """Send a completion and read its stream. Any failure becomes the record's error.

    Args:
        client: from `connect`.
        name: the kind of request, for the record.
        body: the request; streaming and usage options are added.
        due: start of the measured times, on `time.perf_counter`; None: when the request is sent.
        path: path of the endpoint. For others than chat, only `e2e` is measured, not the time to first token.
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
    """Convert a time of `time.perf_counter` into seconds since the epoch."""
    return time.time() - time.perf_counter() + moment


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"status {status}, {error_text(json.loads(body))}"
    except (ValueError, LookupError, TypeError):
        return f"status {status}, not an error in OpenAI's shape: {body[:200].decode(errors='replace')}"

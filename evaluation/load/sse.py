"""Build a record from the events of a streamed chat completion and their arrival times.

Times are defined in `vllm_vtprune_evaluation.load.records`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from vllm_vtprune_evaluation.load.records import Record

DONE = "[DONE]"


class StreamReader:
    """Collects a stream's events and builds its record."""

    def __init__(self, name: str, *, started: float, due: float, sent: float) -> None:
        """
        Args:
            name: the kind of request.
            started: due time, in seconds since the epoch.
            due: due time, on the clock of `take` and `finish`.
            sent: time of sending, on that clock.
        """
        self._name = name
        self._started = started
        self._due = due
        self._lag = sent - due
        self._content_at: list[float] = []
        self._last_choice: float | None = None
        self._texts: list[str] = []
        self._usage: Mapping[str, Any] = {}
        self._pruning: Mapping[str, Any] | None = None
        self._error: str | None = None
        self._done = False

    def take(self, data: str, at: float) -> None:
        """Add the data of the next event, which arrived ``at`` seconds."""
        if not data:
            return  # for example an event with only an id
        if data == DONE:
            self._done = True
            return
        try:
            chunk = json.loads(data)
        except json.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            self._error = self._error or f"an event is not a JSON object: {data[:200]}"
            return
        if "error" in chunk:
            self._error = self._error or error_text(chunk)
            return
        choices = chunk.get("choices") or ()
        contents = [content for choice in choices if (content := (choice.get("delta") or {}).get("content"))]
        if contents:
            self._content_at.append(at)
            self._texts += contents
        if choices:
            self._last_choice = at
        self._usage = chunk.get("usage") or self._usage
        self._pruning = chunk.get("pruning") or self._pruning

    def finish(self, at: float, error: str | None = None) -> Record:
        """The record of a stream that ended.

        Args:
            at: time of the end, in seconds.
            error: an error outside the stream's text, such as a lost connection.
        """
        if not self._done:
            error = error or f"the stream ended before {DONE}"
        moments = self._content_at
        return Record(
            name=self._name,
            started=self._started,
            elapsed=at - self._due,
            ttft=moments[0] - self._due if moments else None,
            itls=tuple(later - earlier for earlier, later in pairwise(moments)),
            e2e=None if self._last_choice is None else self._last_choice - self._due,
            input_tokens=self._usage.get("prompt_tokens"),
            output_tokens=self._usage.get("completion_tokens"),
            text="".join(self._texts),
            pruning=self._pruning,
            error=self._error or error,
            lag=self._lag,
        )


def error_text(answer: Mapping[str, Any]) -> str:
    """An error in OpenAI's shape (``{"error": {"type", "message", ...}}``) on one line."""
    error = answer["error"]
    if not isinstance(error, dict):
        return str(error)
    return f"{error.get('type') or 'error'}: {error.get('message')}"

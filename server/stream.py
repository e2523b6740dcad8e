"""Completing the last data event of a server-sent event stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

DONE = "data: [DONE]"


async def with_last_event_completed(
    events: AsyncGenerator[str, None], complete: Callable[[dict[str, Any]], None]
) -> AsyncGenerator[str, None]:
    """Pass a chat completion stream on, with more in its last event before ``[DONE]``.

    An event that may be the last (it ends a choice, or holds no choice) is held back until the next one shows whether
    it was; every other event is passed on as it comes.

    Args:
        events: events as vLLM writes them, ``data: {...}`` and a blank line each; comments pass.
        complete: changes the data of the last event, when it is known. Errors (an event with ``error``) stay as they
            are.
    """
    held: str | None = None
    async with aclosing(events):  # a client that leaves ends the request at once
        async for event in events:
            if event.startswith(":"):
                yield event
                continue
            if held is not None:
                yield _completed(held, complete) if event.startswith(DONE) else held
                held = None
            if _may_be_last(event):
                held = event
            else:
                yield event
        if held is not None:
            yield held


def _may_be_last(event: str) -> bool:
    # Inside a JSON string the quotes would be escaped, so generated text cannot match.
    return '"finish_reason":"' in event or '"choices":[]' in event


def _completed(event: str, complete: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(event.removeprefix("data:"))
    complete(data)
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

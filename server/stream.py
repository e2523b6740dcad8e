"""Complete the last data event of a server-sent event stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

DONE = "data: [DONE]"


async def with_last_event_completed(
    events: AsyncGenerator[str, None], complete: Callable[[dict[str, Any]], None]
) -> AsyncGenerator[str, None]:
    """Forward a chat completion stream, and complete its last event before ``[DONE]``.

    An event that may be the last (it ends a choice, or holds no choice) is delayed until the next one arrives. All
    others are forwarded at once.

    Args:
        events: vLLM's events, ``data: {...}`` and a blank line each; comments are forwarded.
        complete: changes the data of the last event in place. Error events are not changed.
    """
    held: str | None = None
    async with aclosing(events):  # a disconnect ends the request at once
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
    # quotes inside JSON strings are escaped, so generated text cannot match
    return '"finish_reason":"' in event or '"choices":[]' in event


def _completed(event: str, complete: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(event.removeprefix("data:"))
    complete(data)
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def read_event(event: str) -> tuple[str, dict[str, Any]]:
    """Name and data of a server-sent event that has both."""
    name, _, data = event.partition("\n")
    fields: dict[str, Any] = json.loads(data.removeprefix("data:"))
    return name.removeprefix("event:").strip(), fields


def write_event(name: str, data: dict[str, Any]) -> str:
    """The inverse of `read_event`."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

"""The report goes into the last event of a stream, and no other event waits for it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtprune_server.stream import with_last_event_completed

DONE = "data: [DONE]\n\n"
COMMENT = ": keep-alive\n\n"
REPORT = {"images": [], "note": "naïve — 猫"}


def event(**data: Any) -> str:
    """As vLLM writes them: compact JSON, characters as they are."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def token(text: str, index: int = 0) -> str:
    return event(choices=[{"index": index, "delta": {"content": text}, "finish_reason": None}])


def finish(index: int = 0, reason: str = "stop") -> str:
    return event(choices=[{"index": index, "delta": {}, "finish_reason": reason}])


def usage() -> str:
    return event(choices=[], usage={"total_tokens": 3})


ERROR = event(error={"message": "the engine died", "type": "InternalServerError", "code": 500})


def passed(events: Iterable[str], value: Callable[[], Any] = lambda: REPORT) -> list[str]:
    """What comes out for these events."""

    async def source() -> AsyncGenerator[str, None]:
        for chunk in events:
            yield chunk

    async def collect() -> list[str]:
        return [chunk async for chunk in with_last_event_completed(source(), lambda data: data.update(pruning=value()))]

    return asyncio.run(collect())


def data(text: str) -> dict[str, Any]:
    return json.loads(text.removeprefix("data: "))


def with_report(text: str) -> dict[str, Any]:
    return {**data(text), "pruning": REPORT}


def check(events: list[str], last: int) -> None:
    """Every event comes out as it went in and in order, except that the last-th has the report."""
    out = passed(events)
    assert len(out) == len(events)
    assert data(out[last]) == with_report(events[last])
    assert out[last].endswith("}\n\n")
    assert "\n" not in out[last][:-2], "a line break would end the event early"
    assert [chunk for i, chunk in enumerate(out) if i != last] == [chunk for i, chunk in enumerate(events) if i != last]


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_the_event_that_ends_the_only_choice_carries_the_report(reason: str) -> None:
    check([token("a"), token("b"), finish(reason=reason), DONE], last=2)


def test_with_usage_its_event_carries_the_report() -> None:
    check([token("a"), finish(), usage(), DONE], last=2)


def test_of_several_choices_the_one_that_ends_last() -> None:
    check([token("a", 1), finish(1), token("a", 0), token("b", 0), finish(0), DONE], last=4)
    check([finish(1), finish(0), DONE], last=1)
    check([finish(1), finish(0), usage(), DONE], last=2)


@pytest.mark.parametrize(
    "text",
    [
        '"finish_reason":"stop"',
        '{"choices":[],"finish_reason":"length"}',
        '\\"finish_reason\\":\\"stop\\"',
        "data: [DONE]\n\n",
        ": not a comment",
    ],
)
def test_generated_text_that_looks_like_the_protocol_is_text(text: str) -> None:
    check([token(text), token(text), finish(), DONE], last=2)
    assert pulled_before_each([token(text), token("b"), finish(), DONE])[:2] == [1, 2], "held back"


def test_unicode_survives_in_the_event_that_is_rewritten() -> None:
    ending = event(
        choices=[{"index": 0, "delta": {"content": '猫 naïve 🐈 \u2028 \x7f \\ "'}, "finish_reason": "stop"}]
    )
    out = passed([ending, DONE])
    assert data(out[0]) == with_report(ending)
    assert "猫 naïve 🐈" in out[0], "escaped needlessly"


def test_an_error_stays_as_it_is_and_nothing_is_reported() -> None:
    for events in ([token("a"), ERROR, DONE], [ERROR, DONE], [finish(1), ERROR, DONE]):
        assert passed(events) == events


def test_a_stream_that_ends_early_passes_whole_and_without_a_report() -> None:
    for events in ([], [token("a")], [token("a"), finish()], [finish(), usage()]):
        assert passed(events) == events


def test_comments_pass_at_once_even_while_an_event_is_held() -> None:
    assert passed([COMMENT, token("a"), finish(), COMMENT, DONE])[:3] == [COMMENT, token("a"), COMMENT]
    out = passed([finish(), COMMENT, DONE])
    assert data(out[1]) == with_report(finish())
    assert out[2] == DONE


def test_the_report_is_asked_for_once_and_after_everything_else() -> None:
    asked_after = []
    seen = []

    def events() -> Iterable[str]:
        for chunk in (token("a"), finish(1), finish(0), usage(), DONE):
            seen.append(chunk)
            yield chunk

    passed(events(), lambda: asked_after.append(len(seen)))
    assert asked_after == [5]


def pulled_before_each(events: list[str]) -> list[int]:
    """For each event that comes out, how many had to go in before."""
    pulled = 0
    counts = []

    async def source() -> AsyncGenerator[str, None]:
        nonlocal pulled
        for chunk in events:
            pulled += 1
            yield chunk

    async def run() -> None:
        async for _ in with_last_event_completed(source(), lambda data: data.update(pruning=REPORT)):
            counts.append(pulled)

    asyncio.run(run())
    return counts


def test_only_events_that_may_be_the_last_wait_and_only_for_the_next() -> None:
    events = [token("a"), COMMENT, token("b"), finish(1), token("c"), finish(0), usage(), DONE]
    #         1           2        3           held: 5    5           held: 7  held: 8  8
    assert pulled_before_each(events) == [1, 2, 3, 5, 5, 7, 8, 8]


def test_leaving_early_ends_the_source_too() -> None:
    closed = []

    async def source() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield token("a")
        finally:
            closed.append(True)

    async def leave() -> None:
        out = with_last_event_completed(source(), lambda data: None)
        await anext(out)
        await out.aclose()
        assert closed == [True]  # here: when the loop ends, it closes whatever is left

    asyncio.run(leave())


events_of_a_stream = st.lists(
    st.one_of(
        st.builds(token, st.text(), st.integers(0, 2)),
        st.builds(finish, st.integers(0, 2), st.sampled_from(["stop", "length"])),
        st.just(usage()),
        st.just(ERROR),
        st.just(COMMENT),
    )
)


def comparable(events: list[str]) -> list[Any]:
    """The events but for comments, which may overtake a held one, and for the report."""
    return [
        chunk if chunk == DONE else {key: value for key, value in data(chunk).items() if key != "pruning"}
        for chunk in events
        if chunk != COMMENT
    ]


@given(events_of_a_stream, st.booleans())
def test_nothing_is_lost_changed_or_reordered(events: list[str], done: bool) -> None:
    events = [*events, DONE] if done else events
    out = passed(events)
    assert comparable(out) == comparable(events)
    assert out.count(COMMENT) == events.count(COMMENT)

    last = [chunk for chunk in events if chunk not in (DONE, COMMENT)][-1:]
    reports = done and last != [ERROR] and last != [] and not _is_token(last[0])
    reported = [i for i, chunk in enumerate(out) if chunk not in (DONE, COMMENT) and "pruning" in data(chunk)]
    assert len(reported) == reports
    assert all(chunk in (DONE, COMMENT) for i in reported for chunk in out[i + 1 :])


def _is_token(chunk: str) -> bool:
    return any(choice["finish_reason"] is None for choice in data(chunk).get("choices", ()))

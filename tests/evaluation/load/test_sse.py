"""What is read from a stream: over real HTTP, and event by event with times of our own."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.chat import data_of
from tests.support.fake_chat import DONE, ROLE, Reply, event, fake_chat, report, token, usage
from vllm_vtprune_evaluation.load.client import ask, connect
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.sse import StreamReader

ERROR = event({"error": {"message": "the engine died", "type": "InternalServerError", "code": 500}})
STREAM = (ROLE, token("na"), token("ïve "), token("猫🐈"), token(None, "length"), usage(100, 5), DONE)


def asked(*parts: bytes | float, status: int = 200, cut: bool = False, timeout: float = 20) -> Record:
    """The record of a request that a server answers with these parts (numbers are seconds of silence)."""
    with fake_chat(lambda _: Reply(parts, status, cut)) as fake, connect(fake.url, timeout=timeout) as client:
        return ask(client, "kind", {"messages": []})


def read(arrivals: Iterable[tuple[float, bytes]]) -> Record:
    """The record of events that came at these times (seconds) after the request was sent."""
    reader = StreamReader("kind", started=5.0, due=1000.0, sent=1000.0)
    at = 0.0
    for at, events in arrivals:
        for data in data_of(events.decode()):
            reader.take(data, 1000.0 + at)
    return reader.finish(1000.0 + at)


# --- the times --------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_definitions() -> None:
    arrivals = [
        (1.0, ROLE),
        (2.0, token("a")),
        (2.5, token("b")),
        (3.5, token(None, "length")),
        (9.0, usage(100, 4)),
        (10.0, DONE),
    ]
    record = read(arrivals)
    assert (record.name, record.started, record.error) == ("kind", 5.0, None)
    assert record.ttft == 2.0, "the first chunk with content, not the role's"
    assert record.itls == (0.5,), "between chunks with content"
    assert record.e2e == 3.5, "the last chunk with a choice, not the usage's"
    assert record.tpot == pytest.approx((3.5 - 2.0) / 3)
    assert record.elapsed == 10.0, "the end of the stream"
    assert (record.input_tokens, record.output_tokens, record.text) == (100, 4, "ab")


def test_empty_deltas_are_no_tokens() -> None:
    record = read([(1.0, token("")), (2.0, token(None)), (3.0, token("a")), (4.0, token("")), (6.0, token("b"))])
    assert (record.ttft, record.itls) == (3.0, (3.0,))


@pytest.mark.parametrize("completion", [0, 1])
def test_an_answer_of_one_token_has_no_time_per_output_token(completion: int) -> None:
    assert read([(1.0, token("a", "stop")), (1.0, usage(10, completion)), (1.0, DONE)]).tpot is None


def test_an_answer_without_text_has_no_first_token() -> None:
    record = read([(1.0, ROLE), (2.0, token(None, "stop")), (2.0, usage(10, 2)), (2.0, DONE)])
    assert (record.ttft, record.itls, record.tpot, record.e2e, record.error) == (None, (), None, 2.0, None)


def test_real_silence_is_measured() -> None:
    record = asked(ROLE, 0.3, token("a"), 0.2, token("b"), token(None, "length"), 0.2, usage(), DONE)
    assert record.error is None
    assert record.ttft is not None
    assert record.e2e is not None
    assert record.ttft >= 0.3
    assert len(record.itls) == 1
    assert record.ttft + record.itls[0] >= 0.5, "whenever the first was looked at"
    assert record.e2e >= 0.5
    assert record.elapsed >= 0.7, "the usage came later"


# --- the bytes --------------------------------------------------------------------------------------------------------


def test_pieces_are_put_together_over_http() -> None:
    data = b"".join(STREAM)
    record = asked(*(data[i : i + 5] for i in range(0, len(data), 5)))
    assert (record.text, record.input_tokens, record.output_tokens, record.error) == ("naïve 猫🐈", 100, 5, None)
    assert len(record.itls) == 2


def test_comments_other_fields_and_line_breaks_of_unicode_end_no_event() -> None:
    noise = b": keep-alive\n\n: another\nevent: message\nid: 7\nretry: 10\n\n"
    record = asked(noise, noise + token("a\u2028b\x85c"), noise, b"id: 8\n" + token("d") + DONE)
    assert (len(record.itls), record.text, record.error) == (1, "a\u2028b\x85cd", None)


# --- what the server says ---------------------------------------------------------------------------------------------


def test_the_report_is_kept() -> None:
    record = asked(token("a"), token(None, "stop"), usage(pruning=report(kept=144)), DONE)
    assert record.pruning == report(kept=144)
    assert record.keep_ratio == 0.25


@pytest.mark.parametrize("pruning", [None, {"method": "none", "images": []}])
def test_without_an_image_there_is_no_keep_ratio(pruning: object) -> None:
    assert read([(1.0, usage(pruning=pruning) + DONE)]).keep_ratio is None


def test_usage_may_be_missing() -> None:
    record = asked(token("a"), token("b", "stop"), DONE)
    assert record.error is None
    assert (record.input_tokens, record.output_tokens, record.tpot) == (None, None, None)


def test_the_last_usage_counts() -> None:
    chunk = {
        "choices": [{"index": 0, "delta": {"content": "a"}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1},
    }
    record = read([(1.0, event(chunk) + usage(9, 2) + event({"choices": [], "usage": None}) + DONE)])
    assert record.output_tokens == 2


def test_usage_and_a_stream_are_asked_for() -> None:
    with fake_chat(lambda _: Reply((DONE,))) as fake, connect(fake.url, timeout=20) as client:
        ask(client, "kind", {"messages": [], "max_tokens": 4})
    assert fake.bodies == [{"messages": [], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_error_in_the_stream_fails_the_request() -> None:
    record = asked(token("a"), ERROR, DONE)
    assert record.error == "InternalServerError: the engine died"
    assert (record.text, record.ttft is not None) == ("a", True), "what came before is kept"


def test_a_connection_cut_before_done_fails_the_request() -> None:
    record = asked(token("a"), 0.05, token("b"), cut=True)
    assert record.error is not None
    assert record.error.startswith("RemoteProtocolError: ")
    assert record.text == "ab"


def test_an_error_says_more_than_the_cut_after_it() -> None:
    record = asked(token("a"), ERROR, cut=True)
    assert record.error == "InternalServerError: the engine died"


def test_a_stream_that_ends_without_done_fails_the_request() -> None:
    assert asked(token("a"), token(None, "stop"), usage()).error == "the stream ended before [DONE]"


@pytest.mark.parametrize("event_", [b"data: {half\n\n", b"data: [1]\n\n", b"data: null\n\n"])
def test_an_event_that_is_no_object_fails_the_request(event_: bytes) -> None:
    record = asked(token("a"), event_, DONE)
    assert record.error == f"an event is not a JSON object: {event_.decode().removeprefix('data: ').strip()}"


def test_a_refusal_tells_what_the_server_said() -> None:
    body = b'{"error": {"message": "pruning.budget: no", "type": "BadRequestError", "param": null, "code": 400}}'
    record = asked(body, status=400)
    assert record.error == "status 400, BadRequestError: pruning.budget: no"
    assert record.ttft is None


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"[]", b"{}", b"null"])
def test_a_refusal_in_another_shape_is_said_to_be_one(body: bytes) -> None:
    assert asked(body, status=502).error == f"status 502, not an error in OpenAI's shape: {body.decode()}"


def test_a_silent_server_does_not_hang_the_client() -> None:
    assert (asked(token("a"), 20.0, DONE, timeout=0.3).error or "").startswith("ReadTimeout")


def test_a_server_that_is_not_there_fails_the_request() -> None:
    with fake_chat(lambda _: Reply(())) as fake:
        url = fake.url
    with connect(url, timeout=5) as client:
        assert (ask(client, "kind", {}).error or "").startswith("ConnectError: ")


def test_clients_of_one_server_are_read_apart() -> None:
    def reply(body: dict[str, str]) -> Reply:
        return Reply((token(body["text"]), 0.05, token(body["text"]), usage(), DONE))

    def talk(text: str) -> str:
        with connect(fake.url, timeout=20) as client:
            return ask(client, text, {"text": text}).text

    with fake_chat(reply) as fake, ThreadPoolExecutor(6) as threads:
        assert list(threads.map(talk, "abcdef")) == [2 * text for text in "abcdef"]

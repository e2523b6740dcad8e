"""What operators see of a server besides its answers: traces, logs in JSON, and how it stops."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.support.chat import (
    DONE,
    ENDLESS,
    ONE_ENGINE_PROCESS,
    SMALL_KV_CACHE,
    VISUAL_TOKENS,
    Body,
    Server,
    by_energy,
    data_of,
    fresh_url,
    kept,
    random_model,
    text_of,
    user,
)
from tests.support.collector import Collector, running_collector
from tests.support.process_tree import command_of, family, kill, survivors
from vllm_vtprune.report import STAGES
from vllm_vtprune_server.process import running_server

pytestmark = pytest.mark.engine

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SHUTDOWN_TIMEOUT = 6  # seconds


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def operated(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that traces, logs in JSON, and gives requests a few seconds to finish when it is stopped."""
    log = tmp_path_factory.mktemp("operated") / "server.log"
    options = [
        *random_model(),
        *("--otlp-traces-endpoint", collector.endpoint),
        *("--logging-config.formatter", "json"),
        *("--shutdown-timeout", str(SHUTDOWN_TIMEOUT)),
        *("--max-model-len", "4096"),
        *SMALL_KV_CACHE,
        *ONE_ENGINE_PROCESS,
        "--enforce-eager",
    ]
    environment = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",  # milliseconds between exports
    }
    with running_server(options, environment=environment, log=log) as url:
        yield Server(url, log)


# --- traces ---------------------------------------------------------------------------------------------------------


OF_AN_IMAGE = ("vtprune.text", "vtprune.budget", "vtprune.select")
OF_A_REQUEST = ("chat_completion", "llm_request", "vtprune.encode", *OF_AN_IMAGE)


def spans_of(collector: Collector, trace_id: str, *expected: str) -> dict[str, list[Any]]:
    """The spans of one trace by name, when those that are expected have come."""
    deadline = time.monotonic() + 120
    while True:
        spans = [span for span in list(collector.spans) if span.trace_id.hex() == trace_id]
        if Counter(expected) <= Counter(span.name for span in spans):
            by_name: dict[str, list[Any]] = {}
            for span in spans:
                by_name.setdefault(span.name, []).append(span)
            return by_name
        assert time.monotonic() < deadline, f"only {[span.name for span in spans]} of {len(collector.spans)} spans"
        time.sleep(0.1)


@pytest.mark.parametrize("stream", [False, True])
def test_stages_are_spans_below_the_request_s(operated: Server, collector: Collector, stream: bool) -> None:
    trace_id = TRACE_ID[:-1] + str(int(stream))
    headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
    began = time.time_ns()
    body = {
        "messages": [user("Where is the dog?", fresh_url(), fresh_url())],
        "pruning": by_energy(64),
        "stream": stream,
    }
    assert operated.post(body, headers=headers).status_code == 200

    spans = spans_of(collector, trace_id, *OF_A_REQUEST, *OF_AN_IMAGE)
    forwards = len(spans["vtprune.encode"])
    assert forwards in (1, 2), "one for both images, or the first was on its way when the second came"
    assert {name: len(group) for name, group in spans.items()} == {
        "chat_completion": 1,
        "llm_request": 1,
        "vtprune.text": 2,
        "vtprune.encode": forwards,
        "vtprune.budget": 2,
        "vtprune.select": 2,
    }
    [request] = spans.pop("chat_completion")
    assert request.parent_span_id.hex() == PARENT_ID, "the client's"
    assert began <= request.start_time_unix_nano < request.end_time_unix_nano <= time.time_ns()
    for span in (span for group in spans.values() for span in group):
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano < span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano + 50_000_000
    planning = [spans[f"vtprune.{stage}"][index] for index in range(2) for stage in ("budget", "select")]
    order = sorted([*spans["vtprune.encode"], *planning], key=lambda span: span.start_time_unix_nano)
    assert all(span.name == "vtprune.encode" for span in order[:forwards])
    assert all(earlier.end_time_unix_nano <= later.start_time_unix_nano for earlier, later in pairwise(order))
    attributes = collector.attributes_of(request)
    assert attributes["gen_ai.request.id"] == collector.attributes_of(spans["llm_request"][0])["gen_ai.request.id"]
    report = {name: attributes[f"vtprune.{name}"] for name in ("method", "visual_tokens", "kept_tokens", "outcome")}
    assert report == {"method": "resprune", "visual_tokens": 1152, "kept_tokens": 128, "outcome": "finished"}


def test_spans_last_as_long_as_the_report_says(operated: Server, collector: Collector) -> None:
    trace_id = TRACE_ID[:-1] + "2"
    headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
    response = operated.post(
        {"messages": [user("Where is the dog?", fresh_url())], "pruning": by_energy(64)}, headers=headers
    )
    timings = response.json()["pruning"]["timings_ms"]
    spans = spans_of(collector, trace_id, *OF_A_REQUEST)
    for stage in STAGES:
        [span] = spans[f"vtprune.{stage}"]
        assert (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 == pytest.approx(timings[stage], abs=0.01)


def test_a_request_that_is_refused_is_traced_too(operated: Server, collector: Collector) -> None:
    trace_id = TRACE_ID[:-1] + "3"
    headers = {"traceparent": f"00-{trace_id}-{PARENT_ID}-01"}
    assert operated.post({"messages": [user("Where?")], "pruning": "blanced"}, headers=headers).status_code == 400
    [request] = spans_of(collector, trace_id, "chat_completion")["chat_completion"]
    assert collector.attributes_of(request)["vtprune.outcome"] == "refused"


def test_without_a_caller_s_trace_one_is_begun(operated: Server, collector: Collector) -> None:
    before = {span.trace_id for span in collector.spans}
    operated.ask(messages=[user("Where is the dog?", fresh_url())], pruning=by_energy(64))
    deadline = time.monotonic() + 120
    while not (fresh := [s for s in list(collector.spans) if s.name == "llm_request" and s.trace_id not in before]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    spans = spans_of(collector, fresh[0].trace_id.hex(), *OF_A_REQUEST)
    assert spans["chat_completion"][0].parent_span_id == b""
    assert fresh[0].parent_span_id == spans["chat_completion"][0].span_id


# --- the log --------------------------------------------------------------------------------------------------------


def test_the_log_can_be_read_by_a_machine(operated: Server) -> None:
    operated.post(
        {"messages": [user("Where is the zebra?", fresh_url())], "pruning": "fast"}, headers={"x-request-id": "find-me"}
    )
    entries = [json.loads(line) for line in operated.log.read_text().splitlines() if "find-me" in line]
    [entry] = [entry for entry in entries if entry["name"] == "vllm.vtprune.requests"]
    fields = entry["pruning"]
    assert fields["request_id"] == "chatcmpl-find-me"
    assert (fields["method"], fields["preset"], fields["kept_tokens"]) == ("resprune", "fast", 64)
    assert fields["timings_ms"]["ttft"] > 0
    operated.post(
        {"messages": [user("Where is the zebra?")], "pruning": "zebra"}, headers={"x-request-id": "find-refused"}
    )
    [entry] = [json.loads(line) for line in operated.log.read_text().splitlines() if "find-refused" in line]
    fields = entry["pruning"]
    assert (entry["levelname"], fields["outcome"], fields["code"], fields["field"]) == (
        "INFO",
        "refused",
        400,
        "pruning",
    )
    assert fields["why"].startswith("expected an object, false, or a preset: ")
    assert "zebra" not in operated.log.read_text()


# --- usage ----------------------------------------------------------------------------------------------------------


def test_usage_tells_visual_tokens_where_vllm_gives_no_details(operated: Server) -> None:
    """This server has no --enable-prompt-tokens-details."""
    request: Body = {"messages": [user("Where is the dog?", fresh_url())], "pruning": "fast"}
    expected = {"visual_tokens": VISUAL_TOKENS, "kept_tokens": 64}
    details = operated.ask(**request)["usage"]["prompt_tokens_details"]
    assert {name: value for name, value in details.items() if value is not None} == {"vtprune": expected}
    last = operated.stream(**request, stream_options={"include_usage": True})[-1]
    assert last["usage"]["prompt_tokens_details"] == {"vtprune": expected}
    assert "usage" not in operated.stream(**request)[-1], "not asked for"


# --- the end --------------------------------------------------------------------------------------------------------


def check_ended(error: Body) -> None:
    """Ours says that the server shuts down; vLLM's, where it is the first to see its engine end, that this happened."""
    assert (error["code"], error["message"][:34]) in (
        (503, "The server is shutting down and di"),
        (500, "EngineCore encountered an issue. S"),
    )


def test_sigterm_finishes_what_it_can_and_says_what_it_cannot(operated: Server) -> None:
    """The last test of this file: it ends the server."""
    port = str(urlsplit(operated.url).port)
    [root] = [child for child in psutil.Process().children() if port in command_of(child).split()]
    processes = family(root.pid)
    endless: Body = {**ENDLESS, "messages": [user("Where?", fresh_url())], "pruning": "fast", "max_tokens": 3900}
    short: Body = {"messages": [user("Where?", fresh_url())], "pruning": "fast", "max_tokens": 8, "ignore_eos": True}
    started = threading.Barrier(3)

    def stream(body: Body) -> str:
        request = {**operated.defaults, **body, "stream": True}
        with httpx.stream("POST", f"{operated.url}/v1/chat/completions", json=request, timeout=120) as answer:
            parts = answer.iter_text()
            first = next(parts)
            started.wait(120)
            return first + "".join(parts)

    try:
        with ThreadPoolExecutor(3) as threads:
            whole = threads.submit(operated.post, {**endless, "stream": False})
            cut, finished = threads.submit(stream, endless), threads.submit(stream, short)
            started.wait(120)
            root.terminate()
            deadline = time.monotonic() + 60
            while "stopping engine manager" not in operated.log.read_text():
                assert time.monotonic() < deadline, "SIGTERM was not noticed"
                time.sleep(0.05)
            try:
                late = operated.post(short)
            except httpx.TransportError:  # on a busy machine: it has stopped to listen by then
                pass
            else:
                assert late.status_code == 503, f"a request that comes too late: {late.text}"
                assert "shutting down" in late.json()["error"]["message"]

            *chunks, done = data_of(finished.result())
            assert done == DONE
            assert len(text_of(map(json.loads, chunks))) > 0
            assert kept(json.loads(chunks[-1])) == [64], "finished, with its report"

            *chunks, error, done = data_of(cut.result())
            assert done == DONE
            assert len(chunks) > 8
            check_ended(json.loads(error)["error"])

            response = whole.result()
            assert "error" in response.json(), f"answered as if it were whole: {response.text[:1000]}"
            check_ended(response.json()["error"])
            assert response.status_code == response.json()["error"]["code"]
        assert survivors(processes, within=30) == []
    finally:
        kill(processes)
    entries = [json.loads(line) for line in operated.log.read_text().splitlines() if "vllm.vtprune.requests" in line]
    outcomes = [entry["pruning"]["outcome"] for entry in entries]
    assert outcomes.count("failed") == 2

"""Two API processes before one engine or two: who loads the tower, what adds up, and that all of them end."""

import json
import re
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.support.chat import (
    DONE,
    ENDLESS,
    SMALL_KV_CACHE,
    VISUAL_TOKENS,
    Server,
    by_energy,
    data_of,
    fresh_url,
    kept,
    nouns,
    random_model,
    user,
)
from tests.support.process_tree import command_of, family, kill, survivors
from vllm_vtprune_server.process import running_server

pytestmark = pytest.mark.engine

THINGS = ["dog", "bus", "tree", "cat", "boat", "hat", "cup", "lamp"]
TOWER_LOADED = "Vision encoder loaded"
STOPPED_WITHIN = 60  # seconds


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.verify)])
def engines(request: pytest.FixtureRequest) -> int:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two_processes(engines: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two API processes; requests without a policy follow the preset `balanced`."""
    log = tmp_path_factory.mktemp("two-processes") / "server.log"
    options = [
        *random_model(),
        *("--api-server-count", "2", "--data-parallel-size", str(engines)),
        *("--pruning-default", "balanced"),
        *("--max-model-len", "2048"),
        *SMALL_KV_CACHE,
        "--enforce-eager",
        *("--dtype", "float32"),  # answers do not depend on what they are computed beside
    ]
    with running_server(options, log=log) as url:
        yield Server(url, log)


def processes_that_loaded_a_tower(server: Server) -> list[str]:
    """As their lines in the log begin: role and process id."""
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if TOWER_LOADED in line]
    return [line[: line.index(")")].lstrip("(") for line in lines]


def test_only_the_api_process_loads_the_tower(server: Server) -> None:
    server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=by_energy(64))
    [process] = processes_that_loaded_a_tower(server)
    assert re.fullmatch(r"APIServer pid=\d+", process)


def test_every_api_process_loads_it_once_and_no_engine_does(two_processes: Server) -> None:
    processes = processes_that_loaded_a_tower(two_processes)
    assert len(set(processes)) == len(processes) == 2
    assert {re.sub(r" pid=\d+", "", process) for process in processes} == {"ApiServer_0", "ApiServer_1"}


def test_every_request_is_pruned_and_reported(two_processes: Server) -> None:
    before = two_processes.metrics()
    counts = []
    for index, thing in enumerate(THINGS):
        messages = [user(f"Where is the {thing}?", fresh_url())]
        if index % 2:
            answer = two_processes.ask(messages=messages)
        else:
            answer = two_processes.stream(messages=messages, stream_options={"include_usage": True})[-1]
        report = answer["pruning"]
        assert (report["method"], report["preset"]) == ("resprune", "balanced")
        [image] = report["images"]
        assert image["visual_tokens"] == VISUAL_TOKENS
        assert 128 <= image["kept_tokens"] < VISUAL_TOKENS
        assert image["energy"] >= 0.99
        assert nouns(answer) == [[thing]]
        counts += kept(answer)
        text_tokens = answer["usage"]["prompt_tokens"] - counts[-1]
        assert 0 < text_tokens < 20

    names = ["visual_tokens_total", "visual_tokens_kept_total", "keep_ratio_count", "feature_cache_misses_total"]
    names.append("time_to_first_token_seconds_count")
    grown = two_processes.metrics().since(before, *(f"vtprune:{name}" for name in names))
    assert grown == (len(THINGS) * VISUAL_TOKENS, sum(counts), *[len(THINGS)] * 3)
    assert two_processes.metrics()["vtprune:build_info"] == 1, "the same in both processes, once"


def test_both_api_processes_answer_and_their_metrics_add_up(two_processes: Server) -> None:
    """Each has a feature cache of its own, so one image is encoded once in each that gets to see it."""
    messages = [user("Where is the dog?", fresh_url())]
    before = two_processes.metrics()
    asked, encoded = 0, 0.0
    seen = set()
    while encoded < 2 and asked < 64:
        answer = two_processes.ask(messages=messages, pruning=by_energy(64))
        asked += 1
        seen.add((*kept(answer), answer["choices"][0]["message"]["content"]))
        (encoded,) = two_processes.metrics().since(before, "vtprune:feature_cache_misses_total")
    assert encoded == 2, f"{asked} requests all went to one process"
    assert len(seen) == 1, "the processes choose differently"
    (counted,) = two_processes.metrics().since(before, "vtprune:visual_tokens_total")
    assert counted == asked * VISUAL_TOKENS


def test_refusals_bypasses_and_bytes_add_up_too(two_processes: Server) -> None:
    """Requests take turns between the processes, so each of them counted some."""
    before = two_processes.metrics()
    for thing in THINGS:
        two_processes.ask(messages=[user(f"Where is the {thing}?", fresh_url())], pruning=by_energy(64))
        assert two_processes.post({"messages": [user(thing, fresh_url())], "pruning": "no such"}).status_code == 400
        everything = {"budget": {"type": "tokens", "keep": VISUAL_TOKENS}}
        answer = two_processes.ask(messages=[user(f"Where is the {thing}?", fresh_url())], pruning=everything)
        assert answer["pruning"]["images"][0]["bypass_reason"] == "budget_not_below_tokens"
    after = two_processes.metrics()
    grown = after.since(
        before, "vtprune:errors_total|reason=policy", "vtprune:bypass_total|reason=budget_not_below_tokens"
    )
    assert grown == (len(THINGS),) * 2
    bytes_grown, encoded = after.since(before, "vtprune:feature_cache_bytes", "vtprune:feature_cache_misses_total")
    assert encoded >= len(THINGS)
    per_image = after["vtprune:feature_cache_bytes"] / after["vtprune:feature_cache_misses_total"]
    assert bytes_grown == encoded * per_image, "the bytes are of every image that either process encoded"


def test_every_engine_answers(two_processes: Server, engines: int) -> None:
    keys = [f"vllm:prompt_tokens_total|engine={engine}" for engine in range(engines)]
    deadline = time.monotonic() + 60
    while not all(two_processes.metrics()[key] > 0 for key in keys):
        assert time.monotonic() < deadline, f"one engine got nothing: {keys}"
        two_processes.ask(messages=[user("Where is the dog?", fresh_url())])


def test_sigterm_ends_them_all_and_a_stream_with_an_error(two_processes: Server, engines: int) -> None:
    """The last test of each server: it ends it. With several API processes, vLLM stops the engines at once."""
    port = str(urlsplit(two_processes.url).port)
    [root] = [child for child in psutil.Process().children() if port in command_of(child).split()]
    processes = family(root.pid)
    try:
        assert len(processes) >= 3 + engines, "itself, two API processes, their engines"
        body = {**two_processes.defaults, **ENDLESS, "messages": [user("Where is the dog?", fresh_url())]}
        with httpx.stream("POST", f"{two_processes.url}/v1/chat/completions", json=body, timeout=120) as answer:
            parts = answer.iter_text()
            first = next(parts)
            root.terminate()
            *_, last, done = data_of(first + "".join(parts))
        assert done == DONE
        assert json.loads(last)["error"]["code"] in (503, 500), "500 where vLLM is the first to see an engine end"
        assert survivors(processes, within=STOPPED_WITHIN) == []
    finally:
        kill(processes)

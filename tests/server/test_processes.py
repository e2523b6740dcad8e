"""Two API processes before one engine or two: one encoder process for both, what adds up, and that all of them end."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.server.test_weights import reload
from tests.support.chat import (
    DONE,
    ENDLESS,
    SMALL_KV_CACHE,
    VISUAL_TOKENS,
    Body,
    Server,
    by_energy,
    data_of,
    fresh_url,
    kept,
    nouns,
    random_model,
    tokens,
    user,
)
from tests.support.process_tree import command_of, family, kill, survivors
from vllm_vtprune.plugin.encoder_client import EncoderUnavailable
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_server.process import running_server
from vllm_vtprune_server.supervisor import BEAT, PATIENCE

pytestmark = [pytest.mark.engine, pytest.mark.verify]  # test_shared_encoder.py has the parts in one process

NOUNS = ["dog", "bus", "tree", "cat", "boat", "hat", "cup", "lamp"]
ENCODER_LOADED = "Vision encoder loaded"
AT_ONCE = 30  # seconds
RESTARTED_WITHIN = 120
STOPPED_WITHIN = 60


@pytest.fixture(scope="module", params=[1, 2])
def engines(request: pytest.FixtureRequest) -> int:
    return request.param  # type: ignore[no-any-return]


@contextmanager
def serving(log: Path, engines: int = 1, processes: int = 2) -> Iterator[Server]:
    """Two API processes, or one; requests without a policy follow the preset `balanced`."""
    options = [
        *random_model(),
        *("--api-server-count", str(processes), "--data-parallel-size", str(engines)),
        *("--pruning-default", "balanced"),
        *("--max-model-len", "2048"),
        *SMALL_KV_CACHE,
        "--enforce-eager",
        *("--dtype", "float32"),  # answers do not depend on what they are computed beside
    ]
    with running_server(options, log=log, environment={"VLLM_SERVER_DEV_MODE": "1"}) as url:
        yield Server(url, log)


@pytest.fixture(scope="module")
def two_processes(engines: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("two-processes") / "server.log", engines) as server:
        yield server


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("one-process") / "server.log", processes=1) as server:
        yield server


def processes_of(server: Server) -> list[psutil.Process]:
    """A server's processes, the first one first."""
    port = str(urlsplit(server.url).port)
    [root] = [child for child in psutil.Process().children() if port in command_of(child).split()]
    return family(root.pid)


def processes_that_loaded_an_encoder(server: Server) -> list[str]:
    """As their lines in the log begin: role and process id."""
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if ENCODER_LOADED in line]
    return [line[: line.index(")")].lstrip("(") for line in lines]


def test_a_single_api_process_loads_the_encoder_itself(one_process: Server) -> None:
    one_process.ask(messages=[user("Where is the dog?", fresh_url())], pruning=by_energy(64))
    [process] = processes_that_loaded_an_encoder(one_process)
    assert re.fullmatch(r"APIServer pid=\d+", process)


def test_one_encoder_process_loads_it_and_neither_api_process_nor_engine_does(two_processes: Server) -> None:
    [process] = processes_that_loaded_an_encoder(two_processes)
    assert re.fullmatch(r"Encoder pid=\d+", process)
    for _ in NOUNS:  # either API process answers some
        vision_encoder = two_processes.get("/v1/pruning").json()["vision_encoder"]
        assert (vision_encoder["device"], vision_encoder["shared"]) == ("cpu", True)
        assert vision_encoder["parameters"] > 0


@pytest.mark.parametrize("policy", [by_energy(64), {"method": "prumerge", "budget": {"type": "method"}}])
def test_answers_and_reports_are_those_of_a_server_with_one_process(
    two_processes: Server, one_process: Server, policy: Body
) -> None:
    messages = [user("Where are the dog and the bus?", fresh_url())]
    answers = [each.ask(messages=messages, pruning=policy, max_tokens=16) for each in (two_processes, one_process)]
    reports = [answer["pruning"] for answer in answers]
    stages = [{stage for stage, ms in report.pop("timings_ms").items() if ms is not None} for report in reports]
    assert stages[0] == stages[1] > {"encode", "budget", "select"}
    assert reports[0] == reports[1]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_every_request_is_pruned_and_reported(two_processes: Server) -> None:
    before = two_processes.metrics()
    counts = []
    for index, noun in enumerate(NOUNS):
        messages = [user(f"Where is the {noun}?", fresh_url())]
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
        assert nouns(answer) == [[noun]]
        counts += kept(answer)
        text_tokens = answer["usage"]["prompt_tokens"] - counts[-1]
        assert 0 < text_tokens < 20

    names = ["visual_tokens_total", "visual_tokens_kept_total", "keep_ratio_count", "feature_cache_misses_total"]
    names.append("time_to_first_token_seconds_count")
    grown = two_processes.metrics().since(before, *(f"vtprune:{name}" for name in names))
    assert grown == (len(NOUNS) * VISUAL_TOKENS, sum(counts), *[len(NOUNS)] * 3)
    assert two_processes.metrics()["vtprune:build_info"] == 1, "the same in both processes, once"


def process_that_answered(server: Server, answer: Body) -> str:
    """As the answer's line in the log begins."""
    [line] = [
        line for line in server.log.read_text(errors="replace").splitlines() if f"{answer['id']} finished" in line
    ]
    return line[: line.index(" pid=")].lstrip("(")


def test_an_image_that_both_api_processes_get_is_encoded_once(two_processes: Server) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    before = two_processes.metrics()
    answers: list[Body] = []
    processes: set[str] = set()
    while len(processes) < 2:
        assert len(answers) < 64, "all requests went to one process"
        answers.append(two_processes.ask(messages=messages, pruning=by_energy(64)))
        processes.add(process_that_answered(two_processes, answers[-1]))
    assert processes == {"ApiServer_0", "ApiServer_1"}
    assert len({(*kept(answer), answer["choices"][0]["message"]["content"]) for answer in answers}) == 1
    names = ["feature_cache_misses_total", "feature_cache_hits_total", "encode_batch_size_count", "visual_tokens_total"]
    grown = two_processes.metrics().since(before, *(f"vtprune:{name}" for name in names))
    assert grown == (1, 1, 1, len(answers) * VISUAL_TOKENS), "each process plans it once"


def test_refusals_bypasses_and_bytes_add_up_too(two_processes: Server) -> None:
    """Requests take turns between the processes, so each of them counted some."""
    before = two_processes.metrics()
    for noun in NOUNS:
        two_processes.ask(messages=[user(f"Where is the {noun}?", fresh_url())], pruning=by_energy(64))
        assert two_processes.post({"messages": [user(noun, fresh_url())], "pruning": "no such"}).status_code == 400
        everything = {"budget": {"type": "tokens", "keep": VISUAL_TOKENS}}
        answer = two_processes.ask(messages=[user(f"Where is the {noun}?", fresh_url())], pruning=everything)
        assert answer["pruning"]["images"][0]["bypass_reason"] == "budget_not_below_tokens"
    after = two_processes.metrics()
    grown = after.since(
        before, "vtprune:errors_total|reason=policy", "vtprune:bypass_total|reason=budget_not_below_tokens"
    )
    assert grown == (len(NOUNS),) * 2
    bytes_grown, encoded = after.since(before, "vtprune:feature_cache_bytes", "vtprune:feature_cache_misses_total")
    assert encoded >= len(NOUNS)
    per_image = after["vtprune:feature_cache_bytes"] / after["vtprune:feature_cache_misses_total"]
    assert bytes_grown == encoded * per_image, "the bytes are of every image that was encoded"


def test_every_engine_answers(two_processes: Server, engines: int) -> None:
    keys = [f"vllm:prompt_tokens_total|engine={engine}" for engine in range(engines)]
    deadline = time.monotonic() + 60
    while not all(two_processes.metrics()[key] > 0 for key in keys):
        assert time.monotonic() < deadline, f"one engine got nothing: {keys}"
        two_processes.ask(messages=[user("Where is the dog?", fresh_url())])


def encoder_of(server: Server) -> psutil.Process:
    """The encoder process of a server."""
    [encoder] = [process for process in processes_of(server) if "Encoder" in process.name()]
    return encoder


def until_restarted(server: Server) -> None:
    """Wait until images are encoded again."""
    deadline = time.monotonic() + RESTARTED_WITHIN
    body = {"messages": [user("Where is the dog?", fresh_url())], "pruning": by_energy(64)}
    while server.post(body).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_new_encoder_process_takes_the_place_of_one_that_died(two_processes: Server, tmp_path: Path) -> None:
    """With the weights that the engine has by then. Only requests that need it fail meanwhile, each at once."""

    def answer_to(pruning: Any, url: str) -> tuple[int, Body]:
        began = time.monotonic()
        response = two_processes.post({"messages": [user("Where is the dog?", url)], "pruning": pruning})
        assert time.monotonic() - began < AT_ONCE
        return response.status_code, response.json()

    def content(answer: tuple[int, Body]) -> str:
        assert answer[0] == 200, answer
        return str(answer[1]["choices"][0]["message"]["content"])

    seen, every_token = fresh_url(), by_energy(VISUAL_TOKENS)
    original = content(answer_to(every_token, seen))
    reload(two_processes, write_llava_checkpoint(tmp_path / "other", seed=1))
    try:
        assert content(answer_to(every_token, seen)) == content(answer_to(False, seen)) != original
        before, bystanders = two_processes.metrics(), [p for p in processes_of(two_processes) if p.name() != "sh"]
        dead = encoder_of(two_processes)
        dead.kill()
        dead.wait(10)
        status, error = answer_to(every_token, fresh_url())
        assert (status, error["error"]["code"], error["error"]["message"]) == (503, 503, str(EncoderUnavailable()))
        for untouched in (False, tokens(32)):
            content(answer_to(untouched, fresh_url()))
        new = fresh_url()
        until_restarted(two_processes)
        answer = answer_to(every_token, new)
        assert content(answer) == content(answer_to(False, new)), "the engine's encoder has other weights"
        assert two_processes.metrics().since(before, "vtprune:encoder_restarts_total") == (1,)
        assert {process.pid for process in bystanders} - {process.pid for process in processes_of(two_processes)} == {
            dead.pid
        }
    finally:
        reload(two_processes, tiny_checkpoint())
    assert content(answer_to(every_token, seen)) == original


def test_an_encoder_process_that_hangs_is_killed_and_replaced(two_processes: Server) -> None:
    before, hung = two_processes.metrics(), encoder_of(two_processes)
    hung.suspend()
    began = time.monotonic()
    answer = two_processes.post({"messages": [user("Where is the dog?", fresh_url())], "pruning": by_energy(64)})
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, str(EncoderUnavailable()))
    assert time.monotonic() - began < PATIENCE * BEAT + 5
    assert survivors([hung], within=5) == []
    until_restarted(two_processes)
    assert two_processes.metrics().since(before, "vtprune:encoder_restarts_total") == (1,)
    assert f"hung for {PATIENCE * BEAT:g} s and was killed" in two_processes.log.read_text(errors="replace")


def test_no_encoder_process_survives_a_server_whose_first_process_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        processes, encoder = processes_of(server), encoder_of(server)
        try:
            processes[0].kill()
            assert survivors([encoder], within=10) == []
        finally:
            kill(processes)


def test_sigterm_ends_them_all_and_a_stream_with_an_error(two_processes: Server, engines: int) -> None:
    """The last test of each server: it ends it. With several API processes, vLLM stops the engines at once."""
    processes = processes_of(two_processes)
    root = processes[0]
    try:
        assert len(processes) >= 4 + engines, "itself, two API processes, their encoder process, their engines"
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

"""Data parallel over machines, on one: a head that serves, with one engine, and a headless node with the other."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chat import SMALL_KV_CACHE, VISUAL_TOKENS, Server, fresh_url, kept, random_model, user
from vllm_vtprune_server.process import free_port, running_server, stop

pytestmark = [pytest.mark.engine, pytest.mark.verify]


@pytest.fixture(scope="module")
def node_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headless") / "node.log"


@pytest.fixture(scope="module")
def head(node_log: Path) -> Iterator[Server]:
    options = [
        *random_model(),
        *("--data-parallel-size", "2", "--data-parallel-size-local", "1"),
        *("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(free_port())),
        *("--max-model-len", "2048"),
        *SMALL_KV_CACHE,
        "--enforce-eager",
    ]
    serve = [sys.executable, "-m", "vllm_vtprune.cli", "serve", *options]
    with node_log.open("wb") as output:
        node = subprocess.Popen(
            [*serve, "--headless", "--data-parallel-start-rank", "1"],
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        log = node_log.with_name("head.log")
        with running_server([*options, "--pruning-default", "balanced"], log=log) as url:
            yield Server(url, log)
    finally:
        stop(node)


def test_the_engine_of_the_other_node_answers_pruned_requests(head: Server) -> None:
    keys = [f"vllm:prompt_tokens_total|engine={engine}" for engine in range(2)]
    deadline = time.monotonic() + 60
    counts = []
    while not all(head.metrics()[key] > 0 for key in keys):
        assert time.monotonic() < deadline, f"one engine got nothing: {keys}"
        answer = head.ask(messages=[user("Where is the dog?", fresh_url())])
        assert answer["pruning"]["method"] == "resprune"
        counts += kept(answer)
    assert head.metrics()["vtprune:visual_tokens_total"] == len(counts) * VISUAL_TOKENS
    assert head.metrics()["vtprune:visual_tokens_kept_total"] == sum(counts)


def test_a_headless_node_loads_no_encoder_of_ours(head: Server, node_log: Path) -> None:
    assert "Vision encoder loaded" in head.log.read_text(errors="replace")
    assert "Vision encoder loaded" not in node_log.read_text(errors="replace")

"""A process of the engine dies under load: clients get errors, health goes red, a supervisor's restart recovers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.server.test_operations import check_ended
from tests.support.chat import DONE, ENDLESS, Body, Server, data_of, fresh_url, kept, random_model, user
from tests.support.process_tree import arguments_of, command_of
from vllm_vtprune_evaluation.load.client import ask, connect
from vllm_vtprune_evaluation.load.records import Record

pytestmark = [pytest.mark.engine, pytest.mark.verify]

RED_WITHIN = 10.0  # seconds
ERROR_WITHIN = 30.0
BACK_WITHIN = 600.0
STREAMS, WHOLE = 4, 2
SHORT: Body = {"pruning": "fast", "max_tokens": 4, "ignore_eos": True}
# What a restart policy does: start it again whenever it has ended.
SUPERVISOR = 'while :; do "$@"; echo "supervisor: ended with status $?"; sleep 1; done'
# A request may be refused, or find the door closed while there is no server, or closing at that moment; once it is
# answered, it may not be cut off without a word.
CLEAR = re.compile(
    r"InternalServerError: EngineCore encountered an issue"
    r"|Service Unavailable: The server is shutting down and did not finish this request"
    r"|status 50[03], (InternalServerError|Service ?Unavailable(Error)?): "
    r"|ConnectError: |ReadError: |RemoteProtocolError: Server disconnected without sending a response"
)


# What the process above several that answer says when one of them, or the engine, has died is vLLM's, and differs.
LAST_WORDS = {1: "vtprune serve: the engine died", 2: "RuntimeError"}


@pytest.fixture(scope="module", params=list(LAST_WORDS), ids="{} API processes".format)
def api_processes(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(scope="module")
def supervised(api_processes: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that is started anew whenever it ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("supervised") / "server.log"
    address = ["--host", "127.0.0.1", "--port", str(port), "--api-server-count", str(api_processes)]
    options = [*random_model(), "--max-model-len", "2048", "--enforce-eager", *address]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", SUPERVISOR, "supervisor", sys.executable, "-m", "vllm_vtprune.cli", "serve", *options],
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        assert_back(server)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def assert_back(server: Server) -> None:
    """Wait until the server is healthy."""
    deadline = time.monotonic() + BACK_WITHIN
    while not healthy(server):
        assert time.monotonic() < deadline, server.log.read_text(errors="replace")[-3000:]
        time.sleep(0.5)


def healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def process_called(server: Server, title: str) -> psutil.Process:
    """The process below the server's that has this in its name."""
    port = server.url.rpartition(":")[2]
    [supervisor] = [child for child in psutil.Process().children() if port in arguments_of(child)]
    [process] = [child for child in supervisor.children(recursive=True) if title in command_of(child)]
    return process


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_clients_are_told_health_goes_red_and_a_restart_recovers(
    supervised: Server, api_processes: int, victim: str, record_property: Callable[[str, object], None]
) -> None:
    begun = threading.Barrier(STREAMS + 1)

    def stream() -> str:
        body = {**supervised.defaults, **ENDLESS, "pruning": "fast", "messages": [user("Where?", fresh_url())]}
        url = f"{supervised.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=ERROR_WITHIN) as answer:
            parts = answer.iter_text()
            first = next(parts)
            begun.wait(60)
            return first + "".join(parts)

    def whole() -> httpx.Response:
        body = {**ENDLESS, "pruning": "fast", "messages": [user("Where?", fresh_url())]}
        return supervised.post({**body, "stream": False})

    before = supervised.log.stat().st_size
    with ThreadPoolExecutor(STREAMS + WHOLE) as threads:
        wholes = [threads.submit(whole) for _ in range(WHOLE)]
        streams = [threads.submit(stream) for _ in range(STREAMS)]
        begun.wait(60)
        process_called(supervised, victim).kill()
        killed = time.monotonic()

        outcomes, red, back = watch(supervised, killed)
        check_streams(streams)
        check_wholes(wholes)
    record_property("health red after, seconds", round(red, 2))
    record_property("healthy again after, seconds", round(back, 2))
    record_property("requests sent meanwhile", len(outcomes))
    assert red <= RED_WITHIN
    errors = [record.error for record in outcomes if record.error is not None]
    assert errors, "requests in the meantime fail"
    assert [error for error in errors if not CLEAR.match(error)] == []
    log = supervised.log.read_bytes()[before:].decode(errors="replace")
    assert LAST_WORDS[api_processes] in log
    assert statuses(supervised, before) == ["1"], "a supervisor that restarts on failure would not"
    assert kept(supervised.ask(**SHORT, messages=[user("Where?", fresh_url())])) == [64], "pruned as before"


def test_to_be_told_to_stop_is_no_failure(supervised: Server) -> None:
    """The last test of this file: it does not wait for the server to come back."""
    before = supervised.log.stat().st_size
    process_called(supervised, "vllm_vtprune.cli").terminate()
    deadline = time.monotonic() + 60
    while not (codes := statuses(supervised, before)):
        assert time.monotonic() < deadline, "it does not stop"
        time.sleep(0.1)
    assert codes == ["0"]


def statuses(server: Server, since: int) -> list[str]:
    """With what the server ended, by its supervisor; `since` is a position in the log."""
    return re.findall(r"supervisor: ended with status (\d+)", server.log.read_bytes()[since:].decode(errors="replace"))


def watch(server: Server, killed: float) -> tuple[list[Record], float, float]:
    """Go on asking until the server is back.

    Returns:
        What was answered; seconds until health was red, and until it was green again.
    """
    outcomes: list[Record] = []
    red: float | None = None
    with connect(server.url, timeout=ERROR_WITHIN) as client:
        while True:
            green = healthy(server)
            waited = time.monotonic() - killed
            if red is None and not green:
                red = waited
            if red is not None and green:
                return outcomes, red, waited
            assert waited < BACK_WITHIN, server.log.read_text(errors="replace")[-3000:]
            outcomes.append(
                ask(client, "meanwhile", {**server.defaults, **SHORT, "messages": [user("Where?", fresh_url())]})
            )
            time.sleep(0.2)


def check_streams(streams: list[Future[str]]) -> None:
    for future in streams:
        *chunks, error, done = data_of(future.result(ERROR_WITHIN))
        assert done == DONE
        assert chunks
        check_ended(json.loads(error)["error"])


def check_wholes(wholes: list[Future[httpx.Response]]) -> None:
    for future in wholes:
        response = future.result(ERROR_WITHIN)
        check_ended(response.json()["error"])
        assert response.status_code == response.json()["error"]["code"]

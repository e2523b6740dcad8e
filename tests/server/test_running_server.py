"""A server of our own for a while: whatever happens, it and its children are gone afterwards."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.process_tree import command_of, family, interruptible, kill, survivors
from vllm_vtprune_server import process
from vllm_vtprune_server.process import ServerFailed, announced_server, running_server

STUBBORN = """
import http.server, json, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "child":
    time.sleep(600)
child = subprocess.Popen([sys.executable, "-c", os.environ["SCRIPT"], "child"])
print(json.dumps([os.getpid(), child.pid]), flush=True)
if sys.argv[1] == "never healthy":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
"""A server that ignores SIGTERM, as does the child that it starts; it prints both process ids."""


class Stubborn:
    """How to start it, and its processes once it runs."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def options(self, behaviour: str) -> dict[str, Any]:
        environment = {"SCRIPT": STUBBORN}
        return {"arguments": [behaviour], "command": ["-c", STUBBORN], "environment": environment, "log": self.log}

    def left(self) -> list[psutil.Process]:
        """Those of its two processes that still exist; none before it has said which they are."""
        left = []
        for pid in json.loads((self.log.read_text().splitlines() or ["[]"])[0]):
            with suppress(psutil.NoSuchProcess):
                left.append(psutil.Process(pid))
        return left


def wait_for(stubborn: Stubborn) -> list[psutil.Process]:
    """Its processes, once it has said which they are."""
    deadline = time.monotonic() + 60
    while not (stubborn.log.exists() and stubborn.log.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "it did not start"
        time.sleep(0.05)
    return stubborn.left()


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[Stubborn]:
    started = Stubborn(tmp_path / "log")
    yield started
    kill(started.left())


def test_it_serves_and_is_forced_to_end_where_it_does_not_want_to(
    stubborn: Stubborn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_TIMEOUT", 0.5)
    with running_server(**stubborn.options("healthy")) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert urllib.request.urlopen(url).status == 200
        assert len(stubborn.left()) == 2
    assert survivors(stubborn.left(), within=30) == []


def test_an_error_while_it_is_used_ends_it_and_comes_through(
    stubborn: Stubborn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_TIMEOUT", 0.5)
    with pytest.raises(ZeroDivisionError), running_server(**stubborn.options("healthy")):
        raise ZeroDivisionError
    assert survivors(stubborn.left(), within=30) == []


def test_interrupted_while_it_starts_it_is_gone_at_once(stubborn: Stubborn) -> None:
    interrupted = []

    def interrupt(waited: float) -> None:
        if stubborn.log.read_text():
            assert len(stubborn.left()) == 2
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), running_server(**stubborn.options("never healthy"), on_wait=interrupt):
        pytest.fail("it was never healthy")
    assert survivors(stubborn.left(), within=30) == []
    assert time.monotonic() - interrupted[0] < process.STOP_TIMEOUT / 2


RUNS_IT = """
import json, sys
from pathlib import Path
from vllm_vtprune_server import process
process.STOP_TIMEOUT = 0.5
options = json.loads(sys.argv[1])
with process.running_server(**{**options, "log": Path(options["log"])}):
    print("serving", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("behaviour", ["healthy", "never healthy"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_it_ends_with_the_process_that_runs_it(
    number: signal.Signals, status: int, behaviour: str, stubborn: Stubborn
) -> None:
    """A command that is told to end, or killed, leaves nothing behind."""
    options = {**stubborn.options(behaviour), "log": str(stubborn.log)}
    with subprocess.Popen(
        [sys.executable, "-c", RUNS_IT, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as command:
        try:
            if behaviour == "healthy":
                assert command.stdout is not None
                assert command.stdout.readline() == b"serving\n"
            processes = wait_for(stubborn)
            assert len(processes) == 2
            command.send_signal(number)
            assert command.wait(30) == status
        finally:
            command.kill()
    assert survivors(processes, within=30) == []


def test_a_handler_of_the_process_s_own_stays(stubborn: Stubborn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_TIMEOUT", 0.5)
    calls = []

    def note(*_: object) -> None:
        calls.append(True)

    before = signal.signal(signal.SIGTERM, note)
    try:
        with running_server(**stubborn.options("healthy")):
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == [True]
        assert signal.getsignal(signal.SIGTERM) is note
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with running_server(**stubborn.options("healthy")):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_while_it_stops_does_not_leave_it_running(stubborn: Stubborn) -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), running_server(**stubborn.options("healthy")):
            signal.setitimer(signal.ITIMER_REAL, 0.5)  # from now: by then it has been asked to stop
    finally:
        signal.signal(signal.SIGALRM, before)
    assert survivors(stubborn.left(), within=30) == []


def test_a_server_that_ends_by_itself_has_failed_and_its_last_words_are_told() -> None:
    script = "import sys; print('starting', flush=True); sys.exit('no such model')"
    with pytest.raises(ServerFailed, match="ended with status 1") as failed, running_server(command=["-c", script]):
        pytest.fail("it never served")
    assert str(failed.value).endswith("starting\nno such model")


SLOW = """
import http.server, sys, time
time.sleep(1.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_the_seconds_that_it_takes_to_start_are_counted(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(process, "QUIET", 1.0)
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setitem(running_server.__wrapped__.__kwdefaults__, "command", ["-c", SLOW])
    with announced_server("a-model-whose-name-is-long", []) as url:
        assert urllib.request.urlopen(url).status == 200
        shown = stderr.getvalue()
    assert stderr.getvalue() == f"{shown}Stopping the server ...\n"
    line = "Starting a vLLM server with a-model-whose-name-is-long ..."
    if terminal:
        assert re.fullmatch(rf"{line[:43]}(\r{line[:43]} \d s)+\n", shown), shown
    else:
        assert re.fullmatch(rf"{line}\n({line} \d s\n)+", shown), shown


def test_an_interrupt_is_told_of_before_the_server_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(running_server.__wrapped__.__kwdefaults__, "command", ["-c", SLOW])
    with pytest.raises(KeyboardInterrupt), announced_server("a model", []):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith(" ...\n\nStopping the server ...\n")


def test_a_start_that_fails_leaves_the_line_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setitem(running_server.__wrapped__.__kwdefaults__, "command", ["-c", "raise SystemExit(1)"])
    with pytest.raises(ServerFailed), announced_server("a model", []):
        pytest.fail("it never served")
    assert stderr.getvalue().endswith("\n")


def test_a_server_that_does_not_answer_in_time_has_failed(stubborn: Stubborn, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_is_up(waited: float) -> None:
        if stubborn.log.read_text():
            monkeypatch.setattr(process, "START_TIMEOUT", 0.0)

    with (
        pytest.raises(ServerFailed, match="did not answer within"),
        running_server(**stubborn.options("never healthy"), on_wait=time_is_up),
    ):
        pytest.fail("it was never healthy")
    assert survivors(stubborn.left(), within=30) == []


@pytest.mark.engine
@pytest.mark.verify
@pytest.mark.parametrize("started", ["", "EngineCore"], ids=["importing", "engine starts"])
def test_an_interrupt_ends_a_server_that_starts(started: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "vllm_vtprune.cli", "serve", "--enforce-eager", "--port", str(process.free_port())]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=interruptible)
    try:
        deadline = time.monotonic() + 300
        while not any(started in command_of(child) for child in family(server.pid)):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        time.sleep(2)
        processes = family(server.pid)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (130, -signal.SIGINT)  # a shell reports 130 for both
        assert survivors(processes, within=30) == []
    finally:
        kill(processes)
    assert "vtprune serve: interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()

"""Who watches the encoder process: it is started again when it ends or hangs, and never survives its server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import fake_encoder
from tests.support.process_tree import survivors
from vllm_vtprune_server.supervisor import BEAT, METRICS_FOLDER, Supervisor

LIMIT = 60  # seconds

ROOT = Path(__file__).parents[2]


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which each process says who it is, in a folder of its own."""
    monkeypatch.setenv(METRICS_FOLDER, str(tmp_path))
    (tmp_path / "sockets").mkdir()
    return tmp_path / "sockets" / "note"


@pytest.fixture
def supervise(note: Path) -> Iterator[Callable[[Any], Supervisor]]:
    started = []

    def start(run: Any) -> Supervisor:
        started.append(Supervisor("the process", note.parent, run, note))
        started[-1].start()
        return started[-1]

    yield start
    for supervisor in started:
        supervisor.stop()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def starts(note: Path, number: int) -> list[list[str]]:
    """Number, "loaded" and "restarted" of each process, once there are so many."""
    eventually(lambda: note.exists() and len(note.read_text().splitlines()) >= number)
    return [line.split() for line in note.read_text().splitlines()]


def test_a_process_that_ends_is_replaced_by_one_that_loads_at_once(
    supervise: Callable[[Any], Supervisor], note: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = supervise(fake_encoder.serve)
    [[first, *flags]] = starts(note, 1)
    assert flags == ["False", "False"]
    (tmp_path / f"gauge_livesum_{first}.db").touch()
    os.kill(int(first), signal.SIGTERM)  # ignored: a supervisor of the whole server may send it to every process
    os.kill(int(first), signal.SIGKILL)
    _, [second, *flags] = starts(note, 2)
    assert flags == ["True", "True"]
    assert not (tmp_path / f"gauge_livesum_{first}.db").exists(), "a dead process's share of a gauge"
    assert "the process ended with status -9; it is restarted in 0 s" in capsys.readouterr().err
    supervisor.stop()
    assert not psutil.pid_exists(int(second))
    assert len(starts(note, 2)) == 2


def test_one_that_cannot_start_is_not_tried_again_and_takes_the_sockets_away(
    supervise: Callable[[Any], Supervisor], note: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervise(fake_encoder.fail)
    eventually(lambda: not note.parent.exists())
    assert (
        "the process ended with status 3 before it was ready; see its last log lines above" in capsys.readouterr().err
    )


def test_one_that_hangs_is_replaced_and_one_that_is_busy_is_not(
    supervise: Callable[[Any], Supervisor],
    note: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vllm_vtprune_server.supervisor.PATIENCE", 5)
    supervise(fake_encoder.work)
    [[first]] = starts(note, 1)
    time.sleep(8 * BEAT)
    assert len(starts(note, 1)) == 1
    process = psutil.Process(int(first))
    process.suspend()
    starts(note, 2)
    assert survivors([process], within=0) == []
    assert "the process hung for 2.5 s and was killed; it is restarted in 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [False, True])
def test_it_does_not_survive_a_server_that_is_killed(stopped: bool, note: Path) -> None:
    with subprocess.Popen([sys.executable, "-m", "tests.support.fake_encoder", str(note)], cwd=ROOT) as server:
        [[number, *_]] = starts(note, 1)
        process = psutil.Process(int(number))
        if stopped:
            process.suspend()
        server.kill()
    assert survivors([process], within=10) == []

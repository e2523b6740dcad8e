"""Who watches the encoder process: it is started again when it ends, and never survives its server."""

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import fake_encoder
from vllm_vtprune.placement import EncoderPlace
from vllm_vtprune_server.encoders import METRICS_FOLDER, Supervisor

LIMIT = 60  # seconds: a process imports torch before it runs


@pytest.fixture
def supervisor_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervisor]]:
    monkeypatch.setenv(METRICS_FOLDER, str(tmp_path))
    started = []

    def start(run: Any) -> Supervisor:
        folder = tmp_path / "sockets"
        folder.mkdir()
        supervisor = Supervisor(argparse.Namespace(), EncoderPlace("cpu"), folder, run)
        supervisor.start()
        started.append(supervisor)
        return supervisor

    yield start
    for supervisor in started:
        supervisor.stop()


def starts(folder: Path, number: int) -> list[list[str]]:
    """Number, "loaded" and "restarted" of each process, once there are so many."""
    deadline = time.monotonic() + LIMIT
    file = folder / "sockets" / "started"
    while not file.exists() or len(file.read_text().splitlines()) < number:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [line.split() for line in file.read_text().splitlines()]


def test_a_process_that_ends_is_replaced_by_one_that_loads_at_once(
    supervisor_of: Callable[..., Supervisor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = supervisor_of(fake_encoder.serve)
    [[first, *state]] = starts(tmp_path, 1)
    assert state == ["False", "False"]
    (tmp_path / f"gauge_livesum_{first}.db").touch()
    os.kill(int(first), signal.SIGKILL)
    _, [second, *state] = starts(tmp_path, 2)
    assert state == ["True", "True"]
    assert not (tmp_path / f"gauge_livesum_{first}.db").exists(), "a dead process's share of a gauge"
    assert "the vision encoder process on cpu ended with status -9; it is restarted in 0 s" in capsys.readouterr().err
    supervisor.stop()
    assert not psutil.pid_exists(int(second))
    assert len(starts(tmp_path, 2)) == 2


def test_one_that_cannot_start_is_not_tried_again_and_takes_the_sockets_away(
    supervisor_of: Callable[..., Supervisor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor_of(fake_encoder.fail)
    deadline = time.monotonic() + LIMIT
    while (tmp_path / "sockets").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "ended with status 3 before it was ready; see its last log lines above" in capsys.readouterr().err

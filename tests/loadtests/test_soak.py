"""What a soak concludes, and a short one on a real server."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from math import exp
from pathlib import Path
from random import Random

import psutil
import pytest

from loadtests.soak import TOLERANCE, Memory, Process, conclude
from tests.loadtests.test_options import parsed
from tests.support.fake_chat import report
from tests.support.programs import run_module
from vllm_vtprune_evaluation.load.records import Record

FLAT = Process("api", [80.0, 99.0, 100.0, 102.0])
SATURATING = (1244, 1274, 1297, 1351, 1308, 1381, 1405, 1404, 1414, 1399, 1410, 1390, 1379)
"""MiB of an API process in ten minutes under load, without a leak."""


def requests(count: int, error: str | None = None, lag: float = 0.0) -> list[Record]:
    """So many requests, two a second."""
    measured = {"elapsed": 0.4, "ttft": 0.2, "e2e": 0.3, "pruning": report(64)}
    return [Record("FreshImages", i / 2, error=error, lag=lag, **measured) for i in range(count)]


def complaints(
    records: list[Record], processes: list[Process], out: Path, *arguments: str, minutes: float = 10
) -> list[str]:
    """What a soak at two requests per second says."""
    slo = vars(parsed(*arguments))
    return conclude(
        records,
        processes,
        "m",
        argparse.Namespace(out=out, users=4, minutes=minutes, rate=2.0, pruning="balanced", **slo),
    )


def test_a_flat_soak_has_nothing_to_complain_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(requests(119), [FLAT], tmp_path) == []
    shown = capsys.readouterr().out
    line = "api: 80 MiB at first, 100 MiB in the third quarter, 102 MiB in the last (+2.0%)"
    assert line in shown
    assert "100.0% of the requests were sent within 100 ms after they were due" in shown
    assert "TTFT p99 (ms)" in shown
    assert json.loads((tmp_path / "result.json").read_text())["vtprune"]["memory"][0]["mib"] == FLAT.mib
    assert line in (tmp_path / "report.html").read_text()


def test_a_soak_that_prunes_nothing_is_a_complaint(tmp_path: Path) -> None:
    unpruned = [replace(record, pruning=report(576)) for record in requests(119)]
    assert complaints(unpruned, [FLAT], tmp_path) == ["FreshImages: nothing was pruned"]


def test_growth_is_a_complaint(tmp_path: Path) -> None:
    grown = Process("engine", [100.0, 100.0, 100.0, 106.0])
    assert complaints(requests(119), [FLAT, grown], tmp_path) == [
        "engine grew by 6.0% from the third quarter of the run to the last"
    ]


def test_growth_while_caches_fill_is_no_complaint_and_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = Process("engine", [100.0, 100.0, 100.0, 106.0])
    assert complaints(requests(119), [grown], tmp_path, minutes=2) == []
    shown = capsys.readouterr().out
    assert "106 MiB in the last (+6.0%)" in shown
    assert "growth is not judged in a run of less than 8 minutes" in shown


def test_what_saturates_is_told_from_what_leaks() -> None:
    random = Random(1)
    for minutes in (10, 60):
        times = [second / 60 for second in range(0, 60 * minutes, 5)]
        filled = Process("fills its caches", [1400 - 200 * exp(-at / 1.5) + random.gauss(0, 15) for at in times])
        leaking = Process("leaks", [1000 * (1 + 0.5 * at / minutes) + random.gauss(0, 15) for at in times])
        both = Process("does both", [a + b - 1000 for a, b in zip(filled.mib, leaking.mib, strict=True)])
        assert filled.grown < TOLERANCE / 2
        assert min(leaking.grown, both.grown) > TOLERANCE
    seen = Process("api", list(map(float, SATURATING)))
    assert abs(seen.grown) < 0.02
    assert seen.mib[-1] / seen.mib[0] - 1 > TOLERANCE, "what it grew in its first minutes does not count"


def test_a_soak_too_short_for_memory_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(requests(119), [], tmp_path) == []
    assert "memory was not judged: it was looked at less than four times" in capsys.readouterr().out


def test_a_rate_that_is_not_kept_is_a_complaint(tmp_path: Path) -> None:
    [complaint] = complaints([*requests(100), *requests(10, lag=0.2)], [FLAT], tmp_path)
    assert complaint.startswith("only 90.9% of the requests were sent within 100 ms after they were due: ")


def test_failures_and_broken_promises_are_complaints(tmp_path: Path) -> None:
    records = [*requests(118), *requests(1, error="cut")]
    assert complaints(records, [FLAT], tmp_path, "--slo-ttft-p99-ms", "100") == [
        "1 of 119 requests failed: cut",
        "ttft p99 was to be 100 ms at most, and is 200.0 ms",
    ]


def test_memory_is_that_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.soak.SAMPLE_EVERY", 0.01)
    with Memory([psutil.Process()]) as memory:
        deadline = time.monotonic() + 60
        while not memory.processes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    [process] = memory.processes()
    assert len(process.mib) >= 4
    assert process.mib[0] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.2)


def test_memory_of_a_process_that_has_ended_is_not_made_up() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    process.cmdline()
    memory = Memory([process])
    child.kill()
    child.wait()
    with memory:
        time.sleep(0.1)
    assert memory.processes() == []


@pytest.mark.engine
@pytest.mark.verify
def test_a_soak_of_a_real_server(tmp_path: Path) -> None:
    options = "--minutes 1 --rate 1 --users 16".split()
    done = run_module("loadtests.soak", "--out", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failed"] == 0
    assert result["completed"] >= 40
    assert result["vtprune"]["offered_rate"] == 1
    memory = result["vtprune"]["memory"]
    assert len(memory) >= 2, "the API process and the engine"
    for process in memory:
        assert min(process["mib"]) > 1
        assert Process(**process).grown <= 0.2, "caches fill, but the run is short"
        assert f"({Process(**process).grown:+.1%})" in done.stdout

"""What a soak concludes, and a short one on a real server."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.memory import Process
from loadtests.options import add_slo_arguments
from loadtests.records import Record
from loadtests.soak import Memory, conclude

ROOT = Path(__file__).parent.parent.parent
FLAT = Process("api", [100.0, 104.0, 102.0])


def requests(count: int, error: str | None = None) -> list[Record]:
    """So many requests, two a second."""
    return [Record("FreshImages", i / 2, elapsed=0.4, ttft=0.2, e2e=0.3, error=error) for i in range(count)]


def complaints(records: list[Record], processes: list[Process], out: Path, *arguments: str) -> list[str]:
    """What a soak of a minute at two requests per second says."""
    parser = argparse.ArgumentParser()
    add_slo_arguments(parser)
    given = vars(parser.parse_args(arguments))
    return conclude(records, processes, "m", argparse.Namespace(out=out, users=4, minutes=1, rate=2.0, **given))


def test_a_flat_soak_has_nothing_to_complain_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(requests(119), [FLAT], tmp_path) == []
    shown = capsys.readouterr().out
    assert "api: 100 MiB after 200 requests, 102 MiB at the end (+2.0%)" in shown
    assert "TTFT p99 (ms)" in shown
    assert json.loads((tmp_path / "result.json").read_text())["vtprune"]["memory"][0]["mib"] == FLAT.mib
    assert "102 MiB at the end" in (tmp_path / "report.html").read_text()


def test_growth_is_a_complaint(tmp_path: Path) -> None:
    grown = Process("engine", [100.0, 101.0, 106.0])
    assert complaints(requests(119), [FLAT, grown], tmp_path) == ["engine grew by 6.0%"]


def test_a_soak_too_short_for_memory_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(requests(119), [], tmp_path) == []
    assert "memory was not looked at: there were fewer than 200 requests" in capsys.readouterr().out


def test_a_rate_that_is_not_reached_is_a_complaint(tmp_path: Path) -> None:
    [complaint] = complaints(requests(100), [FLAT], tmp_path)
    assert complaint.startswith("only 1.667 of 2 requests per second were sent: ")


def test_failures_and_broken_promises_are_complaints(tmp_path: Path) -> None:
    records = [*requests(118), *requests(1, error="cut")]
    assert complaints(records, [FLAT], tmp_path, "--slo-ttft-p99-ms", "100") == [
        "1 of 119 requests failed: cut",
        "ttft p99 was to be 100 ms at most, and is 200.0 ms",
    ]


def test_memory_is_that_of_the_processes() -> None:
    with Memory([psutil.Process()]) as memory:
        pass
    [process] = memory.processes(skip=0)
    assert memory.processes(skip=1) == [], "it was over before"
    assert process.mib[0] == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.2)


def test_memory_of_a_process_that_has_ended_is_not_made_up() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    process.cmdline()
    memory = Memory([process])
    child.kill()
    child.wait()
    with memory:
        pass
    assert memory.processes(skip=0) == []


@pytest.mark.engine
@pytest.mark.skipif(not os.environ.get("VTPRUNE_VERIFY"), reason="a minute and a half; part of make verify")
def test_a_soak_of_a_real_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests.soak", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--minutes", "1", "--rate", "4", "--users", "8"],
        cwd=ROOT, capture_output=True, text=True, timeout=550, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["failed"] == 0, done.stderr[-3000:]
    assert found["completed"] >= 200
    assert found["vtprune"]["offered_rate"] == 4
    memory = found["vtprune"]["memory"]
    assert len(memory) >= 2, "the API process and the engine"
    assert all(process["mib"] and min(process["mib"]) > 1 for process in memory)

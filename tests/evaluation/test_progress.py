"""Progress is shown all the time, on a terminal and elsewhere."""

import io
import time

import pytest

from vllm_vtprune import cli
from vllm_vtprune_evaluation import progress
from vllm_vtprune_evaluation.progress import Progress


def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A stderr that is no terminal, with lines ten times a second."""
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    for module in (cli, progress):
        monkeypatch.setattr(module, "QUIET", 0.1)
    return stderr


def test_without_a_terminal_there_are_lines_also_while_nothing_moves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stream(monkeypatch)
    with Progress(desc="asked", total=4, unit="questions") as asked:
        asked.update(2)
        time.sleep(0.45)
        asked.update(2)
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("asked: 0 of 4 questions, 00:00")
    assert sum(line.startswith("asked: 2 of 4 questions, 00:0") for line in lines) >= 2
    assert lines[-1].startswith("asked: 4 of 4 questions, 00:0")
    time.sleep(0.2)
    assert shown.getvalue().splitlines() == lines, "nothing more once it is over"


def test_what_is_waited_for_is_named_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stream(monkeypatch)
    with Progress(desc="Preparing"):
        time.sleep(0.15)
    assert set(shown.getvalue().splitlines()) == {"Preparing ... 00:00"}


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stream(monkeypatch)
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    assert list(Progress(range(3), desc="encoded", unit="pictures")) == [0, 1, 2]
    bar = shown.getvalue().split("\r")[-1]
    assert bar.startswith("encoded: 100%|")
    assert "3/3 pictures, 00:00, 00:00 left" in bar
    assert len(bar.strip()) == 69


def test_a_command_that_takes_long_to_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stream(monkeypatch)
    with cli.waiting("Loading vtprune eval"):
        time.sleep(0.25)
    assert shown.getvalue().startswith("Loading vtprune eval ... 0 s\n")


def test_nothing_is_said_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stream(monkeypatch)
    with cli.waiting("Starting", over=lambda: shown.getvalue().count("\n") == 2):
        time.sleep(0.6)
    assert shown.getvalue() == "Starting ... 0 s\n" * 2

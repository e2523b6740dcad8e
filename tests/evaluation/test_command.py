"""Commands as processes: interrupted, continued, where their files are, and what they need of the extra `demo`.

The server is a stand-in: it says yes to every question, until it stops answering; or it never starts.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.fake_chat import FakeChat, Reply, fake_chat
from tests.support.forked import run_cli
from tests.support.process_tree import interruptible, kill, survivors
from tests.support.programs import ROOT
from vllm_vtprune.cli import DEMO_MODULES
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_evaluation.asking import IN_FLIGHT
from vllm_vtprune_evaluation.calibrate import calibrate
from vllm_vtprune_evaluation.command import evaluate
from vllm_vtprune_evaluation.options import embedded_model
from vllm_vtprune_evaluation.photo import photograph

TIMEOUT = 300  # seconds
MESSAGE = "\nInterrupted; run the same command to continue.\n"


class StandIn:
    """Says yes to as many questions as it is allowed to, and keeps the others waiting."""

    allowed = 5
    chat: FakeChat

    def __init__(self) -> None:
        self.numbers = count(1)
        self.closing = threading.Event()

    @property
    def asked(self) -> int:
        return len(self.chat.bodies)

    def reply(self, body: dict[str, Any]) -> Reply:
        if next(self.numbers) > self.allowed:
            self.closing.wait()
            return Reply((), cut=True)
        kept = body["pruning"]["budget"]["keep"] if body["pruning"] else 576
        answer = {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}}],
            "pruning": {"images": [{"kept_tokens": kept, "bypass_reason": None}]},
        }
        return Reply((json.dumps(answer).encode(),), content_type="application/json")


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    with fake_chat(server.reply) as server.chat:
        server.chat.root = embedded_model()
        yield server
        server.closing.set()


def interrupt(command: list[str], when: Callable[[], bool], folder: Path) -> str:
    """Run a command and interrupt it as soon as a condition holds: it has to say how to go on. Returns its stderr."""
    out, err = folder / "stdout", folder / "stderr"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=stdout,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            preexec_fn=interruptible,
        )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not when():
            assert process.poll() is None, err.read_text()
            assert time.monotonic() < deadline, err.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT)
    finally:
        process.kill()
        process.wait()
    stderr = err.read_text()
    assert process.returncode == 130, stderr
    assert stderr.endswith(MESSAGE), stderr
    assert "Traceback" not in stderr
    assert out.read_text() == ""
    return stderr


def test_interrupted_while_it_asks_the_same_command_goes_on_and_tells_where_its_files_are(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--url", stand_in.chat.url, "--questions", "6", "--methods", "uniform,random", "--keep", "64", "--json"]
    options += ["--out", str(tmp_path / "eval"), "--gallery"]
    waiting = stand_in.allowed + IN_FLIGHT

    command = ["-m", "vllm_vtprune.cli", "eval", *options]
    interrupt(command, lambda: stand_in.asked == waiting, tmp_path)
    assert len((tmp_path / "eval/answers.jsonl").read_text().splitlines()) == 1 + stand_in.allowed

    stand_in.allowed = 1000
    evaluate(options)
    assert stand_in.asked == waiting + 3 * 6 - 5, "the answered ones are not asked again"
    out, err = capsys.readouterr()
    [line] = out.splitlines()
    results = json.loads(line)
    assert [result["arm"] for result in results["results"]] == ["unpruned", "uniform@64", "random@64"]
    assert [pair["less"] for pair in results["paired"]] == ["random@64"]
    assert err.splitlines()[-1] == "Results: eval/results.md, results.json, accuracy.png, gallery.png"
    names = ["accuracy.png", "answers.jsonl", "gallery.png", "results.json", "results.md"]
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == names
    tables = (tmp_path / "eval/results.md").read_text()
    assert "\n\n`uniform` less each other at the same budget, in points on the same questions," in tables


@pytest.mark.verify  # another start of Python; what it shares with `vtprune eval` is tested above
def test_calibrate_interrupted_while_it_asks(stand_in: StandIn, tmp_path: Path) -> None:
    photograph().save(tmp_path / "0.png")
    photograph().crop((0, 0, 256, 256)).save(tmp_path / "1.png")
    lines = [{"image": f"{number % 2}.png", "question": f"Is it {number}?"} for number in range(40)]
    (tmp_path / "sample.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stand_in.chat.root = str(tiny_checkpoint())
    options = ["--url", stand_in.chat.url, "--model", stand_in.chat.root, "--sample", str(tmp_path / "sample.jsonl")]
    options += ["--retain", "0.9", "--work", str(tmp_path), "--out", str(tmp_path / "presets.toml")]
    waiting = stand_in.allowed + IN_FLIGHT
    command = ["-m", "vllm_vtprune.cli", "calibrate", *options]
    interrupt(command, lambda: stand_in.asked == waiting, tmp_path)


NEVER_STARTS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.environ["PID_FILE"], "w").write(f"{os.getpid()}.")
time.sleep(600)
"""
WITH_IT = """
import os, sys
os.environ["PID_FILE"] = sys.argv[1]
from vllm_vtprune_server.process import running_server
running_server.__wrapped__.__kwdefaults__["command"] = ["-c", sys.argv[2]]
from vllm_vtprune_evaluation.command import evaluate
evaluate(sys.argv[3:])
"""


@pytest.mark.verify  # another start of Python; `tests/server/test_running_server.py` stops servers that start
def test_interrupted_while_the_server_starts_it_is_stopped(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    options = ["--questions", "1", "--methods", "none", "--out", str(tmp_path / "eval")]
    command = ["-c", WITH_IT, str(file), NEVER_STARTS, *options]
    server: list[psutil.Process] = []

    def started() -> bool:
        if file.exists() and file.read_text().endswith("."):
            server.append(psutil.Process(int(file.read_text()[:-1])))
        return bool(server)

    try:
        stderr = interrupt(command, started, tmp_path)
        assert survivors(server, within=30) == []
    finally:
        kill(server)
    assert "Starting a vLLM server with the demo model ...\n" in stderr


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match=f"--out: {out} cannot be created"):
            evaluate(["--offline", "--out", str(out)])
        with pytest.raises(SystemExit, match=f"--work: {out} cannot be created"):
            calibrate(["--tokens", "9", "--work", str(out), "--out", str(tmp_path / "presets.toml")])


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["calibrate", "--tokens", "64", "--out", "presets.toml"], "skimage"),
        (["demo"], "skimage"),
        (["bench"], "matplotlib"),
    ],
)
def test_a_module_of_the_extra_that_is_missing_is_named(command: list[str], module: str, tmp_path: Path) -> None:
    missing = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules[{module!r}] = None"
    done = run_cli(*command, before=missing)
    assert done.returncode == 1
    assert done.stderr.endswith(f"vtprune {command[0]} needs {module}: pip install 'vllm-vtprune[demo]'\n")
    assert "Traceback" not in done.stderr


def test_the_modules_of_the_extra_are_what_it_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {Requirement(line).name for line in project["optional-dependencies"]["demo"]}
    installed = packages_distributions()
    assert {canonicalize_name(name) for module in DEMO_MODULES for name in installed[module]} == extra

"""What a newcomer sees: on a terminal, every command says something soon and is never silent for long."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllm_vtprune_server.process import free_port

pytestmark = [pytest.mark.engine, pytest.mark.verify]

TIMEOUT = 600.0  # seconds
ENDS_WITHIN = 30.0  # seconds, after Ctrl-C
SILENCE = 5.0  # seconds
SCENE = Path(__file__).parents[1] / "docs" / "images" / "scene.png"

# arguments, what is waited for before Ctrl-C (None: the end), exit status
COMMANDS: dict[str, tuple[list[str], str | None, int]] = {
    "help": (["--help"], None, 0),
    "help of serve": (["serve", "--help"], None, 0),
    "demo": (["demo"], None, 0),
    "inspect": (["inspect", "scene.png", "--query", "Where is the triangle?"], None, 0),
    "serve": (["serve", "--enforce-eager"], r"Ready\. Try:", 0),
    "bench": (["bench", "--pictures", "4", "--requests", "4", "--concurrency", "1"], None, 0),
    "calibrate": (["calibrate", "--tokens", "64", "--out", "presets.toml"], r"unpruned: +[1-9]\d*%", 130),
    "eval": (["eval", "--questions", "20", "--methods", "resprune", "--keep", "64"], None, 0),
}


@dataclass(frozen=True)
class Seen:
    """What a terminal showed.

    Attributes:
        first: seconds to the first output.
        longest: seconds of the longest silence before the interrupt.
        after: the end of what stood there before it.
        text: everything.
        status: exit status.
        ending: seconds from the interrupt to the end; 0 without one.
    """

    first: float
    longest: float
    after: str
    text: str
    status: int
    ending: float


def watch(argv: list[str], folder: Path, until: str | None) -> Seen:
    """Run a command on a terminal, to its end or until it shows a pattern, and then Ctrl-C."""
    controller, terminal = pty.openpty()
    started = last = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_vtprune.cli", *argv],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=folder,
        start_new_session=True,
    )
    os.close(terminal)
    text, silences, interrupted = "", [], None
    try:
        while True:
            assert time.monotonic() < started + TIMEOUT, text
            if not select.select([controller], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(controller, 1 << 16)
            except OSError:  # nobody has the terminal open any more
                data = b""
            now = time.monotonic()
            if interrupted is None:
                silences.append((now - last, text[-200:]))
            last = now
            if not data:
                status = process.wait(TIMEOUT)
                ending = 0.0 if interrupted is None else time.monotonic() - interrupted
                return Seen(silences[0][0], *max(silences), text, status, ending)
            text += data.decode(errors="replace")
            if until is not None and re.search(until, text):
                process.send_signal(signal.SIGINT)
                until, interrupted = None, now
    finally:
        os.close(controller)
        process.kill()


@pytest.mark.parametrize(("argv", "until", "status"), COMMANDS.values(), ids=COMMANDS.keys())
def test_no_command_is_silent_for_long(
    argv: list[str], until: str | None, status: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    shutil.copy(SCENE, tmp_path / "scene.png")
    seen = watch([*argv, "--port", str(free_port())] if argv == COMMANDS["serve"][0] else argv, tmp_path, until)
    name = argv[0].lstrip("-")
    record_property(f"{name}: seconds to the first output", round(seen.first, 1))
    record_property(f"{name}: seconds of the longest silence", round(seen.longest, 1))
    assert seen.status == status, seen.text
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)  # other tests keep the cores busy
    assert seen.longest <= SILENCE * min(2.0, max(1.0, busy)), seen.after
    assert seen.ending <= ENDS_WITHIN

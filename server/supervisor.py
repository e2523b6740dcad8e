"""Keep a process running beside a server: start it again when it ends, and end it with the server."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LONGEST_DELAY = 30.0
"""Most seconds before a restart; doubles from 1 with each end within `STEADY` seconds of a start. The first is
immediate."""
STEADY = 60.0

spawn = multiprocessing.get_context("spawn")  # as vLLM starts API processes


@dataclass(frozen=True)
class Life:
    """What a supervised process and its supervisor tell each other.

    Attributes:
        ready: the process sets it when it can be used.
        loaded: the process sets it when it has loaded what it loads on first use; the next one loads that at once.
        restarted: whether another process ran before.
    """

    ready: Event
    loaded: Event
    restarted: bool = False


class Supervisor:
    """Runs a function in a process of its own, again whenever it ends.

    Args:
        name: of the process, for messages.
        folder: removed if the process ends before it is ready for the first time; it is then not started again.
        run: the function. Gets ``arguments`` and a `Life`.
        arguments: are pickled.
    """

    def __init__(self, name: str, folder: Path, run: Callable[..., None], *arguments: object) -> None:
        self._name, self._folder, self._run, self._arguments = name, folder, run, arguments
        self._ready, self._loaded = spawn.Event(), spawn.Event()
        self._stopping = threading.Event()
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._supervise, name="vtprune-supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Kill the process, which holds nothing that must be saved."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        os.close(self._stop_write)
        self._thread.join()
        os.close(self._stop_read)

    def _supervise(self) -> None:
        while METRICS_FOLDER not in os.environ:  # vLLM sets it before it starts API processes
            if self._stopping.wait(0.01):
                return
        delay, restarted = 0.0, False
        while not self._stopping.wait(delay):
            started = time.monotonic()
            life = Life(self._ready, self._loaded, restarted)
            process = spawn.Process(target=_live, args=(self._run, *self._arguments, life), daemon=True)
            process.start()
            wait([process.sentinel, self._stop_read])
            process.kill()
            process.join()
            mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
            if self._stopping.is_set():
                return
            end = f"vtprune serve: {self._name} ended with status {process.exitcode}"
            if not self._ready.is_set():
                print(f"{end} before it was ready; see its last log lines above", file=sys.stderr)
                shutil.rmtree(self._folder, ignore_errors=True)
                return
            steady = time.monotonic() - started > STEADY
            delay = 0.0 if steady or not restarted else min(max(2 * delay, 1.0), LONGEST_DELAY)
            restarted = True
            print(f"{end}; it is restarted in {delay:g} s", file=sys.stderr)


def _live(run: Callable[..., None], *arguments: object) -> None:
    """Run a function in its process, until the supervisor kills that or has ended itself."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server needs this process until it has ended
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)

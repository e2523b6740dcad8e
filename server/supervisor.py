"""Keep a process running beside a server: start it again when it ends or hangs, and end it with the server."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LONGEST_DELAY = 30.0
"""Most seconds before a restart; doubles from 1 with each end within `STEADY` seconds of a start. The first is
immediate."""
STEADY = 60.0
BEAT = 0.5
"""Seconds between two signs of life, which a thread of the process gives whatever its other threads compute."""
PATIENCE = 60
"""Signs of life that may be missing in a row before the process is killed: 30 seconds. Before the first one it imports
modules, and may take ten times as long. They are counted, so that a process is not blamed for time in which its
supervisor was frozen, too."""
END_WITH_PARENT = 1
"""``PR_SET_PDEATHSIG`` of prctl(2): the kernel signals this process when the thread that started it ends."""

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
            signs, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_live, args=(sender, self._run, *self._arguments, life), daemon=True)
            with signs, sender:
                process.start()
                hung = self._watch(process.sentinel, signs)
            process.kill()
            process.join()
            mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
            if self._stopping.is_set():
                return
            how = f"hung for {PATIENCE * BEAT:g} s and was killed" if hung else f"ended with status {process.exitcode}"
            end = f"vtprune serve: {self._name} {how}"
            if not self._ready.is_set():
                print(f"{end} before it was ready; see its last log lines above", file=sys.stderr)
                shutil.rmtree(self._folder, ignore_errors=True)
                return
            steady = time.monotonic() - started > STEADY
            delay = 0.0 if steady or not restarted else min(max(2 * delay, 1.0), LONGEST_DELAY)
            restarted = True
            print(f"{end}; it is restarted in {delay:g} s", file=sys.stderr)

    def _watch(self, sentinel: int, signs: Connection) -> bool:
        """Wait until the process has ended, is to be stopped, or hangs; whether it hangs."""
        missing, begun = 0, False
        while missing < (PATIENCE if begun else 10 * PATIENCE):
            ready = wait([sentinel, self._stop_read, signs], BEAT)
            if ready == [signs]:
                signs.recv_bytes()
                missing, begun = 0, True
            elif ready:
                return False
            else:
                missing += 1
        return True


def _live(sender: Connection, run: Callable[..., None], *arguments: object) -> None:
    """Run a function in its process, until the supervisor kills that or has ended itself."""
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)  # even if this process is stopped then
    for number in (signal.SIGINT, signal.SIGTERM):  # the server needs this process until it has ended
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_beat, args=(sender,), daemon=True).start()
    run(*arguments)


def _beat(sender: Connection) -> None:
    """Give signs of life, and end with a supervisor that ended before this process began."""
    while True:
        try:
            sender.send_bytes(b"")
        except OSError:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(BEAT)

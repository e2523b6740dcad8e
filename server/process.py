"""A server of our own, started for a while: for the demo, benchmarks and tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

START_TIMEOUT = 900.0  # seconds; large models load slowly
STOP_TIMEOUT = 60.0


class ServerFailed(RuntimeError):
    """The server ended, or did not answer in time; the message holds the end of its log."""


@contextmanager
def running_server(
    arguments: Sequence[str] = (),
    *,
    command: Sequence[str] = ("-m", "vllm_vtprune.cli", "serve"),
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[str]:
    """Run ``vtprune serve ARGUMENTS`` on a free port of this machine; it is stopped when the context ends.

    Meanwhile SIGTERM is `SystemExit` in this process, so that the context ends then too; where this process is killed,
    the server is killed with it.

    Args:
        arguments: the model and options.
        command: what to run with this Python, for comparisons with other servers.
        environment: variables on top of this process's own.
        log: where its output goes; a temporary file if None.
        on_wait: called about once a second while it starts, with the seconds since the start.

    Yields:
        The base URL, without a path.

    Raises:
        ServerFailed: it did not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="vtprune-") as scratch, ExitStack() as stack:
        stack.enter_context(_exit_on_sigterm())
        log = Path(scratch) / "server.log" if log is None else log
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, *arguments, "--host", "127.0.0.1", "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the server in order
            )
        stack.enter_context(_killed_with_this_process(process))
        try:
            _wait_until_healthy(process, url, log, on_wait)
        except BaseException:
            _kill(process)  # it has nothing to finish, and vLLM 0.32.0 loses a SIGTERM while it waits for its engine
            raise
        try:
            yield url
        finally:
            stop(process)


@contextmanager
def announced_server(
    name: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """`running_server`, which says on stderr that it starts, on a terminal in a line that counts the seconds.

    An interrupt is told of too: the server takes its time to stop.

    Args:
        name: of the model, as people know it.
        arguments: as those of `running_server`.
        environment: as that of `running_server`.

    Raises:
        ServerFailed: it did not start.
    """
    line = f"Starting a vLLM server with {name} ..."
    counts = sys.stderr.isatty()
    room = shutil.get_terminal_size().columns - len(" 9999 s")  # a line that wraps could not be written over

    def count(seconds: float) -> None:
        if counts:
            print(f"\r{line[:room]} {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    print(line[:room] if counts else line, end="" if counts else "\n", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        try:
            url = stack.enter_context(running_server(arguments, environment=environment, on_wait=count))
        finally:
            if counts:
                print(file=sys.stderr)
        try:
            yield url
        except KeyboardInterrupt:
            print("\nStopping the server ...", file=sys.stderr, flush=True)  # it ends in order, which takes seconds
            raise


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `SystemExit`, unless this process has decided otherwise or this is not its main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


@contextmanager
def _killed_with_this_process(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Where this process ends within the context, the other one's session is killed: a shell waits for the former."""
    wait = ["sh", "-c", 'read _; kill -KILL "-$0"', str(process.pid)]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, start_new_session=True) as waiting:
        try:
            yield
        finally:
            waiting.kill()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it started.

    First politely; by force after `STOP_TIMEOUT` seconds, or where an impatient user interrupts the wait.
    """
    try:
        process.terminate()
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a server and its whole session at once; also processes that did not follow when the server ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_healthy(
    process: subprocess.Popen[bytes], url: str, log: Path, on_wait: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while (waited := time.monotonic() - started) < START_TIMEOUT:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with status {process.returncode}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            on_wait(waited)
            time.sleep(1)
    raise ServerFailed(f"the server did not answer within {START_TIMEOUT:.0f} s:\n{_tail(log)}")


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])

"""Start and stop a server, for the demo, benchmarks and tests."""

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
from typing import Any, NoReturn

from vllm_vtprune.cli import waiting

START_TIMEOUT = 900.0  # seconds; large models load slowly
STOP_TIMEOUT = 60.0
STOCK_COMMAND = ("-m", "vllm.entrypoints.openai.api_server")
"""Of `running_server`: stock vLLM, with ``VLLM_PLUGINS`` empty in its environment; the model is its option --model."""
QUIET = 4.0  # seconds between two lines of progress that is not on a terminal


class ServerFailed(RuntimeError):
    """The server exited or did not answer in time; the message ends with the end of its log."""


@contextmanager
def running_server(
    arguments: Sequence[str] = (),
    *,
    command: Sequence[str] = ("-m", "vllm_vtprune.cli", "serve"),
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    port: int | None = None,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[str]:
    """Run ``vtprune serve ARGUMENTS`` until the context ends.

    Within the context, SIGTERM raises `SystemExit` in this process, so that the server is stopped. If this process is
    killed, the server is killed, too.

    Args:
        arguments: model and options.
        command: arguments for this Python, to start other servers.
        environment: additional environment variables.
        log: file for the server's output; None: a temporary file.
        port: None: a free one.
        on_wait: called about once a second during startup with the elapsed seconds.

    Yields:
        The base URL, without a path.

    Raises:
        ServerFailed: the server did not start.
    """
    port = free_port() if port is None else port
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
                start_new_session=True,  # so that Ctrl-C reaches only this process, which stops the server
            )
        stack.enter_context(_killed_with_this_process(process))
        try:
            _wait_until_healthy(process, url, log, on_wait)
        except BaseException:
            _kill(process)  # vLLM 0.32.0 ignores SIGTERM while it waits for its engine
            raise
        try:
            yield url
        finally:
            stop(process)


@contextmanager
def announced_server(name: str, arguments: Sequence[str], **options: Any) -> Iterator[str]:
    """`running_server` with progress on stderr: on a terminal a line that counts the seconds, else a line now and then.

    Args:
        name: display name of the model.
        arguments, options: see `running_server`.

    Raises:
        ServerFailed: the server did not start.
    """
    line = f"Starting a vLLM server with {name} ..."
    is_terminal = sys.stderr.isatty()
    width = shutil.get_terminal_size().columns - len(" 9999 s")  # a wrapped line could not be overwritten

    due = QUIET

    def show_seconds(seconds: float) -> None:
        nonlocal due
        if is_terminal:
            print(f"\r{line[:width]} {seconds:.0f} s", end="", file=sys.stderr, flush=True)
        elif seconds >= due:
            print(f"{line} {seconds:.0f} s", file=sys.stderr, flush=True)
            due = seconds + QUIET

    print(line[:width] if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        try:
            url = stack.enter_context(running_server(arguments, on_wait=show_seconds, **options))
        finally:
            if is_terminal:
                print(file=sys.stderr)
        end = ""
        try:
            yield url
        except KeyboardInterrupt:
            end = "\n"
            raise
        finally:
            print(f"{end}Stopping the server ...", file=sys.stderr, flush=True)
            with waiting("Stopping the server"):
                stack.close()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise `SystemExit`, unless it has another handler or this is not the main thread."""
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
    """Kill the other process's session if this process ends within the context; a shell waits for that."""
    wait = ["sh", "-c", 'read _; kill -KILL "-$0"', str(process.pid)]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, start_new_session=True) as waiting:
        try:
            yield
        finally:
            waiting.kill()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and all its processes: SIGTERM, then SIGKILL after `STOP_TIMEOUT` seconds or an interrupt."""
    try:
        process.terminate()
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a server's session, including processes that outlived the server."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """An unused port of this machine."""
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

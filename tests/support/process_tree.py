"""A process and everything that it started, to interrupt it and to see who outlives it."""

import signal
import time

import psutil


def interruptible() -> None:
    """Undo, in a child, what a shell does to its background jobs, a test run among them: there SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def family(pid: int) -> list[psutil.Process]:
    """The process and its descendants, as of now."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def survivors(processes: list[psutil.Process], within: float) -> list[str]:
    """Those that still run after `within` seconds, described; zombies are dead and only wait for their parent."""
    deadline = time.monotonic() + within
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"{process.pid}: {command_of(process)[:200]}" for process in alive]


def kill(processes: list[psutil.Process]) -> None:
    """End what a failed test may have left."""
    for process in processes:
        if _runs(process):
            process.kill()


def command_of(process: psutil.Process) -> str:
    """Its command line; empty for one that has ended."""
    return " ".join(arguments_of(process))


def arguments_of(process: psutil.Process) -> list[str]:
    """Its command line, in parts; none for one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # or a zombie
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

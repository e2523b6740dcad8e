"""What takes the place of an encoder process in tests of its supervisor."""

import os
import sys
import threading
from pathlib import Path

from vllm_vtprune_server.supervisor import Life, Supervisor


def serve(note: Path, life: Life) -> None:
    """Note the process's number and what it was told; then live on."""
    with note.open("a") as file:
        file.write(f"{os.getpid()} {life.loaded.is_set()} {life.restarted}\n")
    life.loaded.set()
    life.ready.set()
    threading.Event().wait()


def work(note: Path, life: Life) -> None:
    """Note the process's number; then be busy without end."""
    with note.open("a") as file:
        file.write(f"{os.getpid()}\n")
    life.ready.set()
    while True:
        sum(range(100_000))


def fail(note: Path, life: Life) -> None:
    """End before anything could be used."""
    raise SystemExit(3)


if __name__ == "__main__":  # a server that supervises one; the module's name lets a new process import it
    from tests.support import fake_encoder

    path = Path(sys.argv[1])
    Supervisor("it", path.parent, fake_encoder.serve, path).start()
    threading.Event().wait()

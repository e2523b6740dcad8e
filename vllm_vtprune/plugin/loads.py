"""Notes of what an engine loaded while it ran: its workers write them, API processes read them.

A file holds them, whose name all processes of an engine inherit. Imports nothing of vLLM.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

PREFIX = "VTPRUNE_LOAD_NOTES"
"""Environment variable: what the names of the files begin with."""


def name_files() -> str:
    """What the names of the files begin with; settled for this process and those that it will start."""
    return os.environ.setdefault(PREFIX, str(Path(tempfile.gettempdir()) / f"vtprune-{uuid4().hex}"))


@dataclass(frozen=True)
class Load:
    """Weights that a worker loaded.

    Attributes:
        model: directory of their checkpoint, or its name on a hub.
        from_checkpoint: whether they were read from there; False for weights that somebody handed in.
    """

    model: str
    from_checkpoint: bool


class LoadNotes:
    """The loads of one engine.

    Args:
        model: what the engine was started with, which tells it from others that the same process started.
    """

    def __init__(self, model: str) -> None:
        self._file = Path(f"{name_files()}-{sha256(model.encode()).hexdigest()[:16]}")
        self._read = self._size()

    def add(self, load: Load) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(load)) + "\n")

    def latest(self) -> Load | None:
        """The last load since this was asked last, or since this object was made; None where there was none."""
        size = self._size()
        if size == self._read:
            return None
        self._read = size
        return Load(**json.loads(self._file.read_text().splitlines()[-1]))

    def _size(self) -> int:
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0

"""A file that records an engine's weight loads: workers append, API processes read.

All processes of an engine inherit the file's name. Does not import vLLM.
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
"""Environment variable: path prefix of the files."""


def notes_prefix() -> str:
    """Path prefix of the files; sets it for this process and its children if it is unset."""
    return os.environ.setdefault(PREFIX, str(Path(tempfile.gettempdir()) / f"vtprune-{uuid4().hex}"))


@dataclass(frozen=True)
class Load:
    """One load of weights by a worker.

    Attributes:
        model: the checkpoint's directory, or its name on a hub.
        from_checkpoint: whether the weights were read from it; False for weights passed in by a caller.
    """

    model: str
    from_checkpoint: bool


class LoadNotes:
    """The loads of one engine.

    Args:
        model: model that the engine started with; separates engines of the same process.
        from_start: whether `latest` also gives loads from before this object was made.
    """

    def __init__(self, model: str, *, from_start: bool = False) -> None:
        self._file = Path(f"{notes_prefix()}-{sha256(model.encode()).hexdigest()[:16]}")
        self._read_bytes = 0 if from_start else self._size()

    def add(self, load: Load) -> None:
        """Append a load."""
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(load)) + "\n")

    def latest(self) -> Load | None:
        """The last load since the previous call, or since this object was made or the start; None if there was none."""
        size = self._size()
        if size == self._read_bytes:
            return None
        self._read_bytes = size
        return Load(**json.loads(self._file.read_text().splitlines()[-1]))

    def _size(self) -> int:
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0

"""Progress on stderr: a bar on a terminal, else a line every few seconds, also while nothing moves on."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from typing import Any, TextIO

from tqdm import tqdm

from vllm_vtprune_server.process import QUIET

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}, {elapsed}, {remaining} left"
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed}, {remaining} left"
WAITING = "{desc} ... {elapsed}"


def quiet() -> None:
    """Have vLLM's and transformers' loggers say errors only: their lines would stand between those of progress."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    logging.getLogger("vllm").setLevel(logging.ERROR)
    set_verbosity_error()
    disable_progress_bar()


class Lines:
    """A stream for tqdm that is no terminal: one line for each state."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=self._stream, flush=True)

    def flush(self) -> None:
        self._stream.flush()


class Progress(tqdm):
    """A `tqdm` that says how far it is at least every few seconds, and how much time is left.

    Args:
        steps: what to iterate over; None: call `update`.
        total: number of steps; None: as many as ``steps`` has, or unknown.
        desc: what is done.
        unit: what a step is, in the plural.
    """

    monitor_interval = 0  # tqdm's own thread, which the one here replaces

    def __init__(self, steps: Any = None, *, desc: str, total: int | None = None, unit: str = "") -> None:
        terminal = sys.stderr.isatty()
        size = shutil.get_terminal_size()  # not 0 x 0, as pseudo-terminals of tools are: tqdm would show nothing there
        counted = total is not None or steps is not None
        self._over = threading.Event()
        super().__init__(
            steps,
            desc=desc,
            total=total,
            unit=unit,
            file=sys.stderr if terminal else Lines(sys.stderr),
            mininterval=0.1 if terminal else float("inf"),
            bar_format=(BAR if terminal else LINE) if counted else WAITING,
            ncols=size.columns - 1 if terminal else None,
            nrows=size.lines,
        )
        threading.Thread(target=self._beat, args=(1.0 if terminal else QUIET,), daemon=True).start()

    def _beat(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            self.refresh()

    def close(self) -> None:
        self._over.set()
        super().close()

"""What takes the place of an encoder process in tests of its supervisor."""

import argparse
import os
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

from vllm_vtprune.placement import EncoderPlace


def serve(
    args: argparse.Namespace, place: EncoderPlace, folder: Path, ready: Event, loaded: Event, restarted: bool
) -> None:
    """Note the process's number and whether it was told that the encoder had been loaded; then live on."""
    with (folder / "started").open("a") as file:
        file.write(f"{os.getpid()} {loaded.is_set()} {restarted}\n")
    loaded.set()
    ready.set()
    threading.Event().wait()


def fail(*arguments: object) -> None:
    """End before anything could be served."""
    raise SystemExit(3)

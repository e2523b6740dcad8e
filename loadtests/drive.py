"""Run Locust with our users in a separate process, because Locust monkey-patches the importing process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_vtprune_evaluation.load.records import Record, load_records

KINDS = ("Conversations", "FreshImages", "ImageSizes", "PolicyMix", "PromptLengths", "RepeatedImages")
"""The user classes of the locustfile."""

LOCUSTFILE = Path("loadtests") / "locustfile.py"
ROOT = Path(__file__).parent.parent
GRACE = 120  # seconds for requests in flight to finish at the end


class DriveFailed(RuntimeError):
    """Locust did not run; the message ends with its log."""


def drive(
    url: str, out: Path, *, users: int, seconds: float, kinds: Sequence[str], options: Sequence[str]
) -> list[Record]:
    """Load a server with users for some seconds.

    Args:
        url: URL of the server.
        out: folder for results and Locust's log.
        users: concurrent users.
        seconds: duration, rounded; requests in flight are then waited for.
        kinds: user classes of `KINDS`; empty: all.
        options: options of the locustfile.

    Returns:
        All requests, including failed ones.

    Raises:
        DriveFailed: Locust ended without results.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    requests = out / "requests.jsonl"
    requests.unlink(missing_ok=True)
    log = out / "locust.log"
    command = [
        *(sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--host", url, "--headless"),
        *("--users", str(users), "--spawn-rate", str(users), "--run-time", f"{round(seconds)}s"),
        *("--stop-timeout", str(GRACE), "--only-summary", "--out", str(out), *options, *kinds),
    ]
    with log.open("wb") as output:
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if not requests.exists():
        raise DriveFailed(f"Locust ended without results:\n{log.read_text(errors='replace')[-3000:]}")
    return load_records(requests)

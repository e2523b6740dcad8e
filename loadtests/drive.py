"""Running Locust on our users for a while, in a process of its own (Locust patches the one in which it is imported)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests.records import Record, load_records

KINDS = ("Conversations", "FreshImages", "ImageSizes", "PolicyMix", "PromptLengths", "RepeatedImages")
"""The user classes of the locustfile."""

LOCUSTFILE = Path("loadtests") / "locustfile.py"
ROOT = Path(__file__).parent.parent
GRACE = 120  # seconds in which requests in flight may finish at the end


class DriveFailed(RuntimeError):
    """Locust did not run; the message holds the end of its log."""


def drive(
    url: str, out: Path, *, users: int, seconds: float, kinds: Sequence[str], options: Sequence[str]
) -> list[Record]:
    """Let users ask a server for some seconds.

    Args:
        url: of the server.
        out: the folder for the results and Locust's log.
        users: at the same time.
        seconds: whole ones, after which no new request is sent; those in flight are waited for.
        kinds: of `KINDS`; none: all of them.
        options: of the locustfile.

    Returns:
        The requests, failed ones included.

    Raises:
        DriveFailed: Locust ended without results.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = out / "requests.jsonl"
    found.unlink(missing_ok=True)
    log = out / "locust.log"
    command = [
        *(sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--host", url, "--headless"),
        *("--users", str(users), "--spawn-rate", str(users), "--run-time", f"{round(seconds)}s"),
        *("--stop-timeout", str(GRACE), "--only-summary", "--out", str(out), *options, *kinds),
    ]
    with log.open("wb") as output:
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if not found.exists():
        raise DriveFailed(f"Locust ended without results:\n{log.read_text(errors='replace')[-3000:]}")
    return load_records(found)

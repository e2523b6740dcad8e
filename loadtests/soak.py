"""Many minutes at a constant rate, with an eye on failed requests and memory: ``make soak``.

    python -m loadtests.soak --out build/soak --minutes 10 --rate 3 --users 16

Starts our server with the model that comes with the package, and with the small caches of
`benchmarks.memory`, so that they are full early. Every kind of user asks. Prints failed requests, percentiles, the rate
that was reached, and the resident memory of each process after the first 200 requests and at the end. The exit status
is 1 if a request failed, a promise (``--slo-...``) was broken, less than 95 % of the rate was reached, or a process
grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread

import psutil

from benchmarks.memory import ENVIRONMENT, FULL_BY, OPTIONS, TOLERANCE, Process, resident, server_process
from benchmarks.memory import role as role_of
from loadtests.client import served_model
from loadtests.drive import DriveFailed, drive
from loadtests.options import add_slo_arguments, count, p99_limits, positive
from loadtests.records import Record
from loadtests.report import table, table_rows, write_report
from loadtests.results import broken, result, span
from vllm_vtprune.demo.server import ServerFailed, running_server

LABEL = "soak"
REACHED = 0.95  # of the rate
LOOK_EVERY = 5.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--minutes", type=positive, default=10, help="how long (default: 10)")
    parser.add_argument("--rate", type=positive, default=3, help="requests per second (default: 3)")
    parser.add_argument("--users", type=count, default=16, help="who share them (default: 16)")
    parser.add_argument("--pruning", default="balanced", metavar="POLICY", help="a preset or JSON (default: balanced)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and questions (default: 0)")
    add_slo_arguments(parser)
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    try:
        with running_server(OPTIONS, environment=ENVIRONMENT) as url:
            model = served_model(url)
            root = server_process(url)
            with Memory([root, *root.children(recursive=True)]) as memory:
                records = drive(
                    url,
                    options.out,
                    users=options.users,
                    seconds=60 * options.minutes,
                    kinds=(),
                    options=[
                        *("--label", LABEL, "--seed", str(options.seed)),
                        *("--rate", str(options.rate), "--pruning", options.pruning),
                    ],
                )
            processes = memory.processes(skip=FULL_BY / options.rate)
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.", file=sys.stderr)
        sys.exit(130)
    except (ServerFailed, DriveFailed) as error:
        sys.exit(f"loadtests: {error}")
    complaints = conclude(records, processes, model, options)
    if complaints:
        sys.exit("\n".join(f"loadtests: {complaint}" for complaint in complaints))


class Memory:
    """Looks at the resident memory of processes, every few seconds while the context lasts."""

    def __init__(self, family: Sequence[psutil.Process]) -> None:
        self._family = list(family)
        self._roles = [role_of(process) for process in family]
        self._seen: list[list[float]] = []  # MiB, by time and process
        self._over = Event()
        self._thread = Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            try:
                self._seen.append(resident(self._family))
            except psutil.NoSuchProcess:
                return  # the requests will have failed, which says more
            if self._over.wait(LOOK_EVERY):
                return

    def processes(self, skip: float) -> list[Process]:
        """What was seen of each process after the first so many seconds; none where that is all."""
        counted = self._seen[math.ceil(skip / LOOK_EVERY) :]
        return [Process(role, [mib[index] for mib in counted]) for index, role in enumerate(self._roles) if counted]


def conclude(
    records: Sequence[Record], processes: Sequence[Process], model: str, options: argparse.Namespace
) -> list[str]:
    """Print and write what was seen. Returns what is wrong with it."""
    summed = result(
        records,
        model=model,
        label=LABEL,
        users=options.users,
        rate=options.rate,
        goodput=options.goodput,
        duration=max(span(records), 60 * options.minutes),
    )
    summed["vtprune"]["memory"] = [asdict(process) for process in processes]
    memory = [
        f"{process.role}: {process.mib[0]:.0f} MiB after {FULL_BY} requests, {process.mib[-1]:.0f} MiB at the end "
        f"({process.grown:+.1%})"
        for process in processes
    ]
    if not processes:
        memory = [f"memory was not looked at: there were fewer than {FULL_BY} requests"]
    reached = summed["vtprune"]["achieved_rate"]
    rate = f"{reached:.3f} of {options.rate:g} requests per second were sent"
    (options.out / "result.json").write_text(json.dumps(summed, indent=1) + "\n")
    write_report(options.out / "report.html", {LABEL: summed}, {LABEL: records}, notes=[rate, *memory])
    print("\n".join([table(table_rows({LABEL: summed}), [LABEL]), rate, *memory]))
    complaints = broken(records, p99_limits(options))
    if reached < REACHED * options.rate:
        complaints.append(f"only {rate}: the server, or the number of users, does not keep this pace")
    complaints += [f"{process.role} grew by {process.grown:.1%}" for process in processes if process.grown > TOLERANCE]
    return complaints


if __name__ == "__main__":
    main()

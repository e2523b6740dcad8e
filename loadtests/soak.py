"""Many minutes at a constant rate, with an eye on failed requests and memory: ``make soak``.

    python -m loadtests.soak --out build/soak --minutes 10 --rate 3 --users 16

Starts our server with the model that comes with the package, and with small caches, so that
they are full early. Every kind of user asks, at times of a schedule (`loadtests.locustfile`). Prints failed requests,
percentiles, how many requests were sent in time, and the resident memory of each process: at first, and the medians of
what was seen every few seconds in the third quarter of the run and in the last.

The exit status is 1 if a request failed, nothing was pruned, a promise (``--slo-...``) was broken, less than 95 % of
the requests were sent in time, or, in a run of 8 minutes or more, a process held 5 % more in the last quarter than in
the third. What it grows before the middle of the run is not judged, for allocators and kernels fill caches of their own
in the first minutes. A leak that adds less than a quarter to a process in the whole run goes unnoticed: run it for
longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Event, Thread

import psutil

from loadtests.client import served_model
from loadtests.drive import DriveFailed, drive
from loadtests.options import add_slo_arguments, count, p99_limits, policy, positive
from loadtests.records import Record
from loadtests.report import table, table_rows, write_report
from loadtests.results import PUNCTUAL, broken, result, span
from vllm_vtprune_server.process import ServerFailed, running_server

OPTIONS = (
    "--max-model-len", "2048", "--enforce-eager", "--mm-processor-cache-gb", "0.02", "--block-size", "32",
    "--num-gpu-blocks-override", "256", "--disable-uvicorn-access-log",
)  # fmt: skip
FEATURE_CACHE_GB = 0.05  # some fifty pictures
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VTPRUNE_FEATURE_CACHE_GB": str(FEATURE_CACHE_GB),
    "VTPRUNE_REPORT_TABLE_SIZE": "100",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",  # else a thousand: one for each weight and number of tokens in a batch
}
TOLERANCE = 0.05  # of its memory, by which a process may grow once the caches are full
LABEL = "soak"
IN_TIME = 0.95  # of the requests
LOOK_EVERY = 5.0  # seconds
JUDGED_FROM = 8  # minutes; in a shorter run the third quarter belongs to those in which caches fill


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--minutes", type=positive, default=10, help="how long (default: 10)")
    parser.add_argument("--rate", type=positive, default=3, help="requests per second (default: 3)")
    parser.add_argument("--users", type=count, default=16, help="who share them: the most in flight (default: 16)")
    parser.add_argument("--pruning", default="balanced", metavar="POLICY", help="a preset or JSON (default: balanced)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, questions and arrivals (default: 0)")
    add_slo_arguments(parser)
    options = parser.parse_args()

    try:
        with running_server(OPTIONS, environment=ENVIRONMENT) as url:
            model = served_model(url)
            with Memory(server_processes(url)) as memory:
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
            processes = memory.processes()
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.", file=sys.stderr)
        sys.exit(130)
    except (ServerFailed, DriveFailed) as error:
        sys.exit(f"loadtests: {error}")
    complaints = conclude(records, processes, model, options)
    if complaints:
        sys.exit("\n".join(f"loadtests: {complaint}" for complaint in complaints))


@dataclass(frozen=True)
class Process:
    """Resident memory of one process.

    Attributes:
        role: what it is, by its command line.
        mib: MiB at equal distances, four times at least.
    """

    role: str
    mib: list[float]

    @property
    def quarters(self) -> list[float]:
        """The median of each quarter of the run."""
        cuts = [len(self.mib) * quarter // 4 for quarter in range(5)]
        return [median(self.mib[start:end]) for start, end in pairwise(cuts)]

    @property
    def grown(self) -> float:
        """From the third quarter to the last, as a share of the former."""
        *_, third, last = self.quarters
        return last / third - 1

    def __str__(self) -> str:
        *_, third, last = self.quarters
        return (
            f"{self.role}: {self.mib[0]:.0f} MiB at first, {third:.0f} MiB in the third quarter, {last:.0f} MiB in the "
            f"last ({self.grown:+.1%})"
        )


def server_processes(url: str) -> list[psutil.Process]:
    """Of a server that this process runs: the one that listens, and all that it has started."""
    port = url.rpartition(":")[2]
    [root] = [child for child in psutil.Process().children() if port in child.cmdline()]
    return [root, *root.children(recursive=True)]


def role_of(process: psutil.Process) -> str:
    """Its command line, cut, without the folder of its program."""
    program, *arguments = process.cmdline() or [process.name()]  # of one that has just ended
    return " ".join([Path(program).name, *arguments])[:32]


def resident(processes: Sequence[psutil.Process]) -> list[float]:
    """MiB of each process."""
    return [process.memory_info().rss / 2**20 for process in processes]


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

    def processes(self) -> list[Process]:
        """What was seen of each process; nothing where it was not seen in each quarter."""
        if len(self._seen) < 4:
            return []
        return [Process(role, [mib[index] for mib in self._seen]) for index, role in enumerate(self._roles)]


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
        arrivals="poisson",
        goodput=options.goodput,
        duration=max(span(records), 60 * options.minutes),
    )
    summed["vtprune"]["memory"] = [asdict(process) for process in processes]
    memory = [str(process) for process in processes] or ["memory was not judged: it was looked at less than four times"]
    punctual = summed["vtprune"]["punctual"] or 0.0
    if options.minutes < JUDGED_FROM:
        memory.append(f"growth is not judged in a run of less than {JUDGED_FROM} minutes: caches are still filling")
    rate = f"{punctual:.1%} of the requests were sent within {1000 * PUNCTUAL:.0f} ms after they were due"
    (options.out / "result.json").write_text(json.dumps(summed, indent=1) + "\n")
    write_report(options.out / "report.html", {LABEL: summed}, {LABEL: records}, notes=[rate, *memory])
    print("\n".join([table(table_rows({LABEL: summed}), [LABEL]), rate, *memory]))
    complaints = broken(records, p99_limits(options), policy(options.pruning))
    if punctual < IN_TIME:
        complaints.append(f"only {rate}: the server, or the number of users, does not keep this pace")
    complaints += [
        f"{process.role} grew by {process.grown:.1%} from the third quarter of the run to the last"
        for process in processes
        if options.minutes >= JUDGED_FROM and process.grown > TOLERANCE
    ]
    return complaints


if __name__ == "__main__":
    main()

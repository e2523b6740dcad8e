"""Many minutes at a constant rate; checks failed requests and memory: ``make soak``.

    python -m loadtests.soak --out build/soak --minutes 10 --rate 3 --users 16

Starts our server with the demo model and small caches, which fill early. Every kind of user asks on a schedule
(`loadtests.locustfile`). Prints failed requests, percentiles, the share of punctual requests, and each process's
resident memory: at the start, and the medians of the third and the last quarter of the run.

The exit status is 1 if a request failed, nothing was pruned, an objective (``--slo-...``) was missed, less than 95 % of
the requests were punctual, or, in a run of at least 8 minutes, a process's memory grew by over 5 % from the third
quarter to the last. Growth in the first half is not judged, because allocators and kernels fill their caches. A leak
of less than about a quarter of a process's memory per run is not detected: run longer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Event, Thread

import psutil

from loadtests.drive import DriveFailed, drive
from loadtests.options import add_slo_arguments, p99_limits, policy, positive
from loadtests.report import results_text, write_report
from vllm_vtprune_evaluation.load.client import served_model
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.results import PUNCTUAL, broken, result, span
from vllm_vtprune_evaluation.options import count
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
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",  # default 1,024: one entry per weight and token count of a batch
}
TOLERANCE = 0.05  # accepted growth of a process, as a share of its memory, once caches are full
LABEL = "soak"
IN_TIME = 0.95  # required share of punctual requests
SAMPLE_EVERY = 5.0  # seconds
JUDGED_FROM = 8  # minutes; in a shorter run, caches still fill in the third quarter


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
        role: its shortened command line.
        mib: MiB at regular intervals, at least four values.
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
        """Relative growth from the third quarter to the last."""
        *_, third, last = self.quarters
        return last / third - 1

    def __str__(self) -> str:
        *_, third, last = self.quarters
        return (
            f"{self.role}: {self.mib[0]:.0f} MiB at first, {third:.0f} MiB in the third quarter, {last:.0f} MiB in the "
            f"last ({self.grown:+.1%})"
        )


def server_processes(url: str) -> list[psutil.Process]:
    """The processes of a server that this process started, the listening one first."""
    port = url.rpartition(":")[2]
    processes = psutil.process_iter(["ppid", "cmdline"])
    children = [process for process in processes if process.info["ppid"] == os.getpid()]
    [root] = [child for child in children if port in (child.info["cmdline"] or ())]  # None: the child has ended
    return [root, *root.children(recursive=True)]


def role_of(process: psutil.Process) -> str:
    """A process's command line, shortened, without the program's folder."""
    program, *arguments = process.cmdline() or [process.name()]  # a process that has just ended has no command line
    return " ".join([Path(program).name, *arguments])[:32]


def resident(processes: Sequence[psutil.Process]) -> list[float]:
    """MiB of each process."""
    return [process.memory_info().rss / 2**20 for process in processes]


class Memory:
    """Samples the resident memory of processes within the context."""

    def __init__(self, family: Sequence[psutil.Process]) -> None:
        self._family = list(family)
        self._roles = [role_of(process) for process in family]
        self._samples: list[list[float]] = []  # MiB, by time and process
        self._stop = Event()
        self._thread = Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            try:
                self._samples.append(resident(self._family))
            except psutil.NoSuchProcess:
                return  # failed requests will report it
            if self._stop.wait(SAMPLE_EVERY):
                return

    def processes(self) -> list[Process]:
        """The samples of each process; empty if there are fewer than four."""
        if len(self._samples) < 4:
            return []
        return [Process(role, [mib[index] for mib in self._samples]) for index, role in enumerate(self._roles)]


def conclude(
    records: Sequence[Record], processes: Sequence[Process], model: str, options: argparse.Namespace
) -> list[str]:
    """Print and write the results. Returns failures and missed objectives."""
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
    print("\n".join([results_text({LABEL: summed}), rate, *memory]))
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

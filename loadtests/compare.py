"""Stock vLLM and this project under the same load, on one machine, in turns: ``make loadtest``.

    python -m loadtests.compare --out build/loadtest                  # about four minutes on two cores
    python -m loadtests.compare --out build/loadtest --users 8 --seconds 60 --rounds 5 --kinds Conversations
    python -m loadtests.compare --out build/placement --users 1 16 --arms stock fast@api fast@engine 0.333@engine
    python -m loadtests.compare --out build/tokens --tokens-per-image 16 279 576 2880 10000 --users 1 --max-tokens 4 \
        --arms stock fast

All servers run all the time, and Locust loads them in turns, so that disturbances of the machine affect all arms; the
first arm rotates. No server gets a picture of an earlier turn, whose features it may have cached.

An arm is ``stock`` (stock vLLM), or POLICY or POLICY@PLACEMENT for our server. POLICY is a preset or the share of
tokens to keep; PLACEMENT is ``auto``, ``api`` or ``engine``. Each placement has a server of its own.

The checkpoint is generated with random weights: its answers are meaningless, and its times are not those of a released
model. It is a LLaVA, of which every picture has 576 tokens; with ``--tokens-per-image`` a Qwen2.5-VL without full
attention in its encoder, and pictures of as many tokens. ``--out`` gets ``result-ARM.json``, ``report.html``, and a
folder per turn; of several runs, a folder for each. The exit status is 1 if a request failed, or if the pruned arm
pruned nothing or missed an objective (``--slo-...``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtests.drive import KINDS, DriveFailed, drive
from loadtests.options import add_slo_arguments, p99_limits
from loadtests.report import results_text, write_report
from loadtests.servers import MODEL, STOCK, Arm, servers
from loadtests.workload import grid_of
from vllm_vtprune_evaluation.load.ratios import paired_ratio
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.results import broken, percentile, result, samples, span
from vllm_vtprune_evaluation.options import count
from vllm_vtprune_server.process import ServerFailed

ARMS = ("stock", "off", "balanced")
COMPARED = [kind for kind in KINDS if kind != "PolicyMix"]  # PolicyMix sets its own policies
SERVE_OPTIONS = tuple("--dtype float32 --max-num-seqs 32".split())
TOKEN_SIDE = 28  # pixels of a token of Qwen2.5-VL
MOST_ELONGATED = 10  # longer to shorter side of a picture
WARM_UP_SECONDS = 1

Turns = dict[str, list[list[Record]]]  # by arm, round by round
Seconds = dict[str, float]  # by arm


@dataclass(frozen=True)
class Load:
    """What the servers bear in one run.

    Attributes:
        users: who ask at the same time.
        tokens: visual tokens of every picture; None: as many as the model makes of any.
    """

    users: int
    tokens: int | None = None

    @property
    def text(self) -> str:
        """For people."""
        return f"users: {self.users}" + (f", tokens per image: {self.tokens}" if self.tokens else "")

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return f"users-{self.users}" + (f"-tokens-{self.tokens}" if self.tokens else "")

    @property
    def locust_options(self) -> tuple[str, ...]:
        """What makes Locust send such pictures."""
        if self.tokens is None:
            return ()
        rows, columns = grid_of(self.tokens)
        return "--picture", f"{TOKEN_SIDE * columns}x{TOKEN_SIDE * rows}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--size", choices=["small", "tiny"], default="small", help="of the model (default: small)")
    parser.add_argument(
        "--arms",
        nargs="+",
        type=Arm.parse,
        default=[Arm.parse(name) for name in ARMS],
        metavar="ARM",
        help="stock, POLICY or POLICY@PLACEMENT; POLICY: a preset or the share of tokens to keep; PLACEMENT: auto, api "
        f"or engine (default: {' '.join(ARMS)})",
    )
    parser.add_argument(
        "--users", nargs="+", type=count, default=[2], help="who ask at the same time, one run for each (default: 2)"
    )
    parser.add_argument(
        "--tokens-per-image",
        nargs="+",
        type=tokens_argument,
        default=[None],
        metavar="N",
        help="visual tokens of every picture, one run for each (default: 576, of another model)",
    )
    parser.add_argument("--seconds", type=count, default=8, help="of each arm in each round (default: 8)")
    parser.add_argument("--rounds", type=count, default=3, help="how often every arm has its turn (default: 3)")
    parser.add_argument("--max-tokens", type=count, default=16, help="tokens of every answer (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and questions (default: 0)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=COMPARED,
        default=["FreshImages"],
        metavar="CLASS",
        help=f"who asks: {', '.join(COMPARED)} (default: FreshImages)",
    )
    add_slo_arguments(parser)
    options = parser.parse_args()
    from vllm_vtprune_checkpoints import write_checkpoint

    family, serve_options = model_for(options.tokens_per_image)
    loads = [Load(users, tokens) for users, tokens in itertools.product(options.users, options.tokens_per_image)]
    complaints: list[str] = []
    try:
        with tempfile.TemporaryDirectory() as directory:
            print(f"Starting stock vLLM and ours with a {options.size} {family} checkpoint ...", file=sys.stderr)
            model = write_checkpoint(family, Path(directory), size=options.size, weights=False)
            with servers(model, serve_options, options.arms) as urls:
                seeds = {url: itertools.count(options.seed) for url in urls.values()}
                for load in loads:
                    out = options.out if len(loads) == 1 else options.out / load.folder
                    turns, seconds = take_turns(urls, seeds, options, load, out)
                    complaints += conclude(turns, seconds, options, load, out)
    except KeyboardInterrupt:
        print("\nInterrupted; the servers are stopped.", file=sys.stderr)
        sys.exit(130)
    except (ServerFailed, DriveFailed) as error:
        sys.exit(f"loadtests: {error}")
    if complaints:
        sys.exit("\n".join(f"loadtests: {complaint}" for complaint in complaints))


def tokens_argument(text: str) -> int:
    """Tokens of a picture, from the command line.

    Raises:
        argparse.ArgumentTypeError: no picture has so many.
    """
    tokens = count(text)
    rows, columns = grid_of(tokens)
    if columns > MOST_ELONGATED * rows:
        raise argparse.ArgumentTypeError(
            f"{tokens} tokens make a picture of {rows} x {columns} tokens; expected at most {MOST_ELONGATED} to 1"
        )
    return tokens


def model_for(tokens: Sequence[int | None]) -> tuple[str, tuple[str, ...]]:
    """The family of a model whose pictures have so many tokens (None: as it is), and its servers' options."""
    largest = max((each for each in tokens if each is not None), default=None)
    if largest is None:
        return "llava", (*SERVE_OPTIONS, "--max-model-len", "2048")
    return "qwen2_5_vl", (
        *SERVE_OPTIONS,
        *("--max-model-len", str(largest + 1024), "--skip-mm-profiling", "--limit-mm-per-prompt.video", "0"),
        *("--mm-processor-kwargs.max_pixels", str(largest * TOKEN_SIDE**2)),
    )


def process_seconds(url: str) -> float:
    """CPU seconds of a server's API process since its start."""
    lines = httpx.get(f"{url}/metrics").raise_for_status().text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("process_cpu_seconds_total"))


def take_turns(
    urls: Mapping[str, str], seeds: Mapping[str, Iterator[int]], options: argparse.Namespace, load: Load, out: Path
) -> tuple[Turns, Seconds]:
    """Load every arm in every round, after a short warm-up of each.

    Args:
        urls: of each arm's server.
        seeds: of each server's turns, by its URL.
        options: of the command line.
        load: who asks about what.
        out: folder for what Locust writes.

    Returns:
        Requests and the API process's CPU seconds, by arm.
    """
    out.mkdir(parents=True, exist_ok=True)

    def turn(arm: Arm, folder: str, seconds: float) -> list[Record]:
        return drive(
            urls[arm.name],
            out / folder,
            users=load.users,
            seconds=seconds,
            kinds=options.kinds,
            options=[
                *("--label", arm.name, "--seed", str(next(seeds[urls[arm.name]]))),
                *("--max-tokens", str(options.max_tokens)),
                *load.locust_options,
                *arm.locust_options,
            ],
        )

    arms: list[Arm] = options.arms
    for arm in arms:
        turn(arm, f"warm-up-{arm.name}", WARM_UP_SECONDS)
    turns: Turns = {arm.name: [] for arm in arms}
    spent: Seconds = dict.fromkeys(turns, 0.0)
    for number in range(options.rounds):
        for position in range(len(arms)):
            arm = arms[(number + position) % len(arms)]
            before = process_seconds(urls[arm.name])
            records = turn(arm, f"round-{number + 1}-{arm.name}", options.seconds)
            spent[arm.name] += process_seconds(urls[arm.name]) - before
            turns[arm.name].append(records)
            median = percentile(samples(records)["ttft"], 50)
            ttft = "-" if median is None else f"{median:.0f} ms"
            print(f"round {number + 1}, {arm.name}: {len(records)} requests, TTFT {ttft}", file=sys.stderr, flush=True)
    return turns, spent


def conclude(turns: Turns, spent: Seconds, options: argparse.Namespace, load: Load, out: Path) -> list[str]:
    """Print and write the comparison. Returns failures and missed objectives."""
    records = {arm: [record for turn in rounds for record in turn] for arm, rounds in turns.items()}
    results = {
        arm: result(
            records[arm],
            model=MODEL,
            label=arm,
            users=load.users,
            goodput=options.goodput,
            duration=sum(span(turn) for turn in rounds),
        )
        for arm, rounds in turns.items()
    }
    ratios = ratios_to_stock(turns)
    for arm, arm_result in results.items():
        (out / f"result-{arm}.json").write_text(json.dumps(arm_result, indent=1) + "\n")
    (out / "ratios.json").write_text(json.dumps(ratios, indent=1) + "\n")
    write_report(
        out / "report.html",
        results,
        records,
        notes=[
            f"The servers took turns on one machine: {options.rounds} rounds of {options.seconds} s each. "
            f"Closed loop ({load.text}). No server got a picture twice. "
            f"The checkpoint is a {options.size} one with random weights.",
            *(f"{name}: {text}." for name, text in ratios.items()),
        ],
    )
    print(load.text)
    print(results_text(results))
    for name, text in ratios.items():
        print(f"{name}: {text}")
    for arm, seconds in spent.items():
        if records[arm]:
            print(f"{arm}, CPU time of the API process: {1000 * seconds / len(records[arm]):.1f} ms per request")
    print(f"report: {out / 'report.html'}")
    pruning = {arm.name: arm.pruning for arm in options.arms if arm.prunes}
    return [
        f"{arm}: {complaint}"
        for arm in turns
        for complaint in broken(records[arm], p99_limits(options) if arm in pruning else {}, pruning.get(arm))
    ]


def ratios_to_stock(turns: Turns) -> dict[str, str]:
    """Ratios of median TTFT and requests per second, paired by round, with 95 % intervals over rounds."""
    ratios = {}
    for arm in (arm for arm in turns if arm != STOCK and STOCK in turns):
        medians = {side: [percentile(samples(r)["ttft"], 50) for r in turns[side]] for side in (arm, STOCK)}
        rates = {side: [len(r) / span(r) if r else 0.0 for r in turns[side]] for side in (arm, STOCK)}
        for name, values in (("median TTFT", medians), ("requests per second", rates)):
            numerators = [value for value in values[arm] if value]
            denominators = [value for value in values[STOCK] if value]
            if len(numerators) == len(denominators) == len(turns[STOCK]):
                ratios[f"{arm} / stock, {name}"] = str(paired_ratio(numerators, denominators))
    return ratios


if __name__ == "__main__":
    main()

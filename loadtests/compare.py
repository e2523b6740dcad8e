"""Stock vLLM and this project under the same load, on one machine, in turns: ``make loadtest``.

    python -m loadtests.compare --out build/loadtest                  # about four minutes on two cores
    python -m loadtests.compare --out build/loadtest --users 8 --seconds 60 --rounds 5 --kinds Conversations

Both servers run all the time, and Locust loads them in turns, so that disturbances of the machine affect all arms. In a
round, all arms have the same seed, that is the same pictures and questions; the first arm rotates.

- stock:     stock vLLM
- off:       our server with ``pruning: false``
- balanced:  our server at the preset ``balanced``

The checkpoint is generated with random weights: its answers are meaningless, and its times are not those of a released
model. ``--out`` gets ``result-ARM.json``, ``report.html``, and a folder per turn. The exit status is 1 if a request
failed, or if the pruned arm pruned nothing or missed an objective (``--slo-...``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import httpx

from loadtests.drive import KINDS, DriveFailed, drive
from loadtests.options import add_slo_arguments, count, p99_limits
from loadtests.ratios import paired_ratio
from loadtests.records import Record
from loadtests.report import table, table_rows, write_report
from loadtests.results import broken, percentile, result, samples, span
from loadtests.servers import ARMS, MODEL, servers
from vllm_vtprune_server.process import ServerFailed

STOCK, OFF, PRUNED = ARMS
COMPARED = [kind for kind in KINDS if kind != "PolicyMix"]  # PolicyMix sets its own policies
LOCUST_OPTIONS: dict[str, tuple[str, ...]] = {STOCK: (), OFF: ("--pruning", "false"), PRUNED: ("--pruning", "balanced")}
SERVE_OPTIONS = tuple("--dtype float32 --max-model-len 2048 --max-num-seqs 32".split())
WARM_UP_SECONDS = 1

Turns = dict[str, list[list[Record]]]  # by arm, round by round


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--size", choices=["small", "tiny"], default="small", help="of the model (default: small)")
    parser.add_argument("--users", type=count, default=2, help="who ask at the same time (default: 2)")
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
    from vllm_vtprune_checkpoints.llava import write_llava_checkpoint  # imports torch: not for --help

    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as directory:
            print(f"Starting stock vLLM and ours with a {options.size} checkpoint ...", file=sys.stderr)
            model = write_llava_checkpoint(directory, size=options.size, weights=False)
            with servers(model, SERVE_OPTIONS) as urls:
                turns = take_turns(urls, options)
                batch = encoder_batch(urls[PRUNED])
    except KeyboardInterrupt:
        print("\nInterrupted; the servers are stopped.", file=sys.stderr)
        sys.exit(130)
    except (ServerFailed, DriveFailed) as error:
        sys.exit(f"loadtests: {error}")
    complaints = conclude(turns, options)
    if batch is not None:
        print(f"images per run of the encoder: {batch:.2f}")
    if complaints:
        sys.exit("\n".join(f"loadtests: {complaint}" for complaint in complaints))


def encoder_batch(url: str) -> float | None:
    """Mean images per run of our vision encoder; None if it has not run."""
    lines = httpx.get(f"{url}/metrics").raise_for_status().text.splitlines()
    images, runs = (
        sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vtprune:encode_batch_size_{name}{{"))
        for name in ("sum", "count")
    )
    return images / runs if runs else None


def take_turns(urls: Mapping[str, str], options: argparse.Namespace) -> Turns:
    """Load every arm in every round, after a short warm-up of each."""

    def turn(arm: str, folder: str, seed: int, seconds: float) -> list[Record]:
        return drive(
            urls[arm],
            options.out / folder,
            users=options.users,
            seconds=seconds,
            kinds=options.kinds,
            options=[
                *("--label", arm, "--seed", str(seed), "--max-tokens", str(options.max_tokens)),
                *LOCUST_OPTIONS[arm],
            ],
        )

    for arm in ARMS:
        turn(arm, f"warm-up-{arm}", options.seed + 1_000_000, WARM_UP_SECONDS)
    turns: Turns = {arm: [] for arm in ARMS}
    for number in range(options.rounds):
        for position in range(len(ARMS)):
            arm = ARMS[(number + position) % len(ARMS)]
            records = turn(arm, f"round-{number + 1}-{arm}", options.seed + number, options.seconds)
            turns[arm].append(records)
            median = percentile(samples(records)["ttft"], 50)
            ttft = "-" if median is None else f"{median:.0f} ms"
            print(f"round {number + 1}, {arm}: {len(records)} requests, TTFT {ttft}", file=sys.stderr, flush=True)
    return turns


def conclude(turns: Turns, options: argparse.Namespace) -> list[str]:
    """Print and write the comparison. Returns failures and missed objectives."""
    records = {arm: [record for turn in rounds for record in turn] for arm, rounds in turns.items()}
    results = {
        arm: result(
            records[arm],
            model=MODEL,
            label=arm,
            users=options.users,
            goodput=options.goodput,
            duration=sum(span(turn) for turn in rounds),
        )
        for arm, rounds in turns.items()
    }
    ratios = ratios_to_stock(turns)
    for arm, arm_result in results.items():
        (options.out / f"result-{arm}.json").write_text(json.dumps(arm_result, indent=1) + "\n")
    (options.out / "ratios.json").write_text(json.dumps(ratios, indent=1) + "\n")
    write_report(
        options.out / "report.html",
        results,
        records,
        notes=[
            f"Stock vLLM and ours took turns on one machine: {options.rounds} rounds of {options.seconds} s each, "
            f"{options.users} users in a closed loop, the same pictures and questions for all arms of a round. "
            f"The checkpoint is the {options.size} LLaVA with random weights.",
            *(f"{name}: {text}." for name, text in ratios.items()),
        ],
    )
    print(table(table_rows(results), list(results)))
    for name, text in ratios.items():
        print(f"{name}: {text}")
    print(f"report: {options.out / 'report.html'}")
    return [
        f"{arm}: {complaint}"
        for arm in ARMS
        for complaint in (
            broken(records[arm], p99_limits(options), PRUNED) if arm == PRUNED else broken(records[arm], {})
        )
    ]


def ratios_to_stock(turns: Turns) -> dict[str, str]:
    """Ratios of median TTFT and requests per second, paired by round, with 95 % intervals over rounds."""
    ratios = {}
    for arm in (OFF, PRUNED):
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

"""Time to first token of each model family, stock vLLM against this project, over sizes of images and budgets.

    python -m loadtests.families                                   # every family of `FAMILIES`, released shapes
    python -m loadtests.families --families qwen2_5_vl --images 336 --rounds 1
    python -m loadtests.families --size tiny --rounds 1            # to see that it works

Weights are random (``--load-format dummy``). One machine may not hold both servers, so they take turns: each round
starts stock vLLM, measures, stops it, then starts ours. Each server first gets one uncounted request per size. Every
picture is new to its server. Reported for each size and keep ratio:

- stock and ours:  time to first token in seconds, median over rounds
- plan:            seconds of text, budget and select in our report
- share:           plan / (stock - ours + plan): the share of the saved time that planning costs
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadtests.servers import server
from loadtests.ttft import ask_about, seconds
from loadtests.workload import picture
from vllm_vtprune_checkpoints import write_checkpoint
from vllm_vtprune_evaluation.load.client import connect
from vllm_vtprune_evaluation.load.machine import machine
from vllm_vtprune_evaluation.load.records import Record

OPTIONS = tuple("--max-num-seqs 1 --no-enable-prefix-caching --skip-mm-profiling".split())
TIMEOUT = 1200  # seconds
IMAGES = {"336": (336, 336), "megapixel": (1008, 1008), "document": (1240, 1754)}
"""Width and height in pixels; the document is A4 at 150 dots per inch."""
KEEPS = {"1/3": 1 / 3, "2/9": 2 / 9, "1/9": 1 / 9}


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        size: size of the checkpoint with released shapes.
        kv_cache: KV cache in GiB, enough for the longest prompt (7 B models: in bfloat16 only).
        options: vLLM's options besides `OPTIONS`.
    """

    size: str
    kv_cache: int
    options: tuple[str, ...]


FAMILIES = {
    "llava": Family("7b", 1, ("--max-model-len", "1024")),
    "llava_next": Family("7b", 2, ("--max-model-len", "3072")),
    "internvl": Family("1b", 1, tuple("--max-model-len 4096 --limit-mm-per-prompt.video 0".split())),
    "qwen2_5_vl": Family(
        "3b",
        1,
        tuple("--max-model-len 4096 --limit-mm-per-prompt.video 0 --mm-processor-kwargs.max_pixels 2408448".split()),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="default: all")
    parser.add_argument("--images", nargs="+", choices=list(IMAGES), default=list(IMAGES), help="default: all")
    parser.add_argument("--size", help="of the checkpoints, instead of released shapes: tiny")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of weights and arithmetic; a vision encoder in bfloat16 may take minutes on a CPU (default: bfloat16)",
    )
    parser.add_argument("--rounds", type=int, default=2, help="how often the servers take turns (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for name in args.families:
        family = replace(FAMILIES[name], options=("--dtype", args.dtype, *FAMILIES[name].options))
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(name, Path(directory), size=args.size or family.size, weights=False, dtype=args.dtype)
            samples = measure(Path(directory), family, args.images, args.rounds)
        for row in summary(samples):
            rows.append({"family": name, "size": args.size or family.size, "dtype": args.dtype, **row})
            print(line(rows[-1]), flush=True)
    if args.out is not None:
        result = {"machine": machine(), "rounds": args.rounds, "weights": "random", "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class Sample:
    """One request, in seconds. `plan` and `encode` come from the report; 0 for stock vLLM."""

    image: str
    keep: str | None  # None: stock vLLM
    ttft: float
    visual_tokens: int = 0
    kept_tokens: int = 0
    plan: float = 0.0
    encode: float = 0.0


def measure(model: Path, family: Family, images: list[str], rounds: int) -> list[Sample]:
    """Measure every size and keep ratio once per round, after one warm-up request per size."""
    samples: list[Sample] = []
    for turn in range(rounds):
        for stock in (True, False):
            options = [*OPTIONS, *family.options]
            with (
                server(model, options, stock=stock, kv_cache_gb=family.kv_cache) as url,
                connect(url, timeout=TIMEOUT) as client,
            ):
                for name in images:
                    ask_about(client, picture(0, IMAGES[name]), None if stock else policy("1/9"))
                    for index, keep in enumerate([None] if stock else KEEPS):
                        image = picture(1000 * turn + index + 1, IMAGES[name])
                        record = ask_about(client, image, None if keep is None else policy(keep))
                        samples.append(_sample(name, keep, record))
                        print(f"round {turn + 1}: {samples[-1]}", file=sys.stderr, flush=True)
    return samples


def policy(keep: str) -> dict[str, Any]:
    return {"budget": {"type": "ratio", "keep": KEEPS[keep]}}


def _sample(image: str, keep: str | None, record: Record) -> Sample:
    if record.pruning is None:
        return Sample(image, keep, seconds(record))
    (pruned,) = record.pruning["images"]
    timings = {stage: (milliseconds or 0.0) / 1000 for stage, milliseconds in record.pruning["timings_ms"].items()}
    plan = timings["text"] + timings["budget"] + timings["select"]
    return Sample(image, keep, seconds(record), pruned["visual_tokens"], pruned["kept_tokens"], plan, timings["encode"])


def summary(samples: list[Sample]) -> list[dict[str, Any]]:
    """One row per image size and keep ratio."""
    rows = []
    for image in dict.fromkeys(sample.image for sample in samples):
        stock = statistics.median(s.ttft for s in samples if s.image == image and s.keep is None)
        for keep in KEEPS:
            pruned = [sample for sample in samples if sample.image == image and sample.keep == keep]
            ttft, plan = (statistics.median(values) for values in ([s.ttft for s in pruned], [s.plan for s in pruned]))
            saved = stock - ttft + plan
            rows.append(
                {
                    "image": image,
                    "pixels": IMAGES[image],
                    "visual_tokens": pruned[0].visual_tokens,
                    "keep": keep,
                    "kept_tokens": pruned[0].kept_tokens,
                    "stock_s": stock,
                    "ours_s": ttft,
                    "encode_s": statistics.median(s.encode for s in pruned),
                    "plan_s": plan,
                    "plan_share": plan / saved if saved > 0 else None,
                }
            )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    share = "nothing saved" if row["plan_share"] is None else f"{row['plan_share']:.1%} of the saving"
    return (
        f"{row['family']} {row['size']:5} {row['image']:10} {row['kept_tokens']:5} of {row['visual_tokens']:5}  "
        f"stock {row['stock_s']:7.2f} s  ours {row['ours_s']:7.2f} s ({row['stock_s'] / row['ours_s']:.2f} x)  "
        f"encode {row['encode_s']:6.2f} s  plan {row['plan_s']:6.3f} s, {share}"
    )


if __name__ == "__main__":
    main()

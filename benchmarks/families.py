"""Time to first token of each model family, stock vLLM against this project, over sizes of images and budgets.

    python -m benchmarks.families                                   # every family of `FAMILIES`, released shapes
    python -m benchmarks.families --families qwen2_5_vl --images 336 --rounds 1
    python -m benchmarks.families --size tiny --rounds 1            # to see that it works

Weights are random (``--load-format dummy``). One machine may not hold both servers, so they take turns: each
round starts stock vLLM, measures, stops it, then starts ours. Each server answers one request of each size that is not
counted. Every picture is one that its server has never seen, and stock is asked about the picture of the first share.
Reported for each size and share of tokens kept:

- stock and ours:  seconds until the first token, medians over rounds
- plan:            of ours, what choosing the tokens took, by the report of each response
- share:           plan / (stock - ours + plan): how much of what pruning saved the plan gave back
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import machine
from vllm_vtprune_checkpoints import write_checkpoint
from vllm_vtprune_evaluation.photo import data_url
from vllm_vtprune_server.process import running_server

NAME = "model"
QUESTION = "What is in the picture?"
STOCK_COMMAND = ("-m", "vllm.entrypoints.openai.api_server")
OPTIONS = (
    "--served-model-name", NAME, "--load-format", "dummy", "--max-num-seqs", "1",
    "--no-enable-prefix-caching", "--enforce-eager", "--disable-uvicorn-access-log", "--skip-mm-profiling",
)  # fmt: skip
IMAGES = {"336": (336, 336), "megapixel": (1008, 1008), "document": (1240, 1754)}
"""Width and height in pixels; the document is A4 at 150 dots per inch."""
KEEPS = {"1/3": 1 / 3, "2/9": 2 / 9, "1/9": 1 / 9}


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        size: of its checkpoint that has released shapes.
        kv_cache: GiB, enough for the longest prompt; of models of 7 B parameters in bfloat16 only.
        options: vLLM's, beside `OPTIONS`.
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
    """One request, in seconds. `plan` and `encode` are of the report, 0 for stock vLLM."""

    image: str
    keep: str | None  # None: stock vLLM
    ttft: float
    visual_tokens: int = 0
    kept_tokens: int = 0
    plan: float = 0.0
    encode: float = 0.0


def measure(model: Path, family: Family, images: list[str], rounds: int) -> list[Sample]:
    """Every size and share, once a round, and before each size a request to warm up."""
    samples: list[Sample] = []
    for turn in range(rounds):
        for stock in (True, False):
            with server(model, family, stock=stock) as url:
                for name in images:
                    ask(url, picture(0, IMAGES[name]), None if stock else min(KEEPS.values()))
                    for index, keep in enumerate([None] if stock else KEEPS):
                        seed = 1000 * turn + index + 1
                        ttft, report = ask(url, picture(seed, IMAGES[name]), None if keep is None else KEEPS[keep])
                        samples.append(_sample(name, keep, ttft, report))
                        print(f"round {turn + 1}: {samples[-1]}", file=sys.stderr, flush=True)
    return samples


def _sample(image: str, keep: str | None, ttft: float, report: dict[str, Any] | None) -> Sample:
    if report is None:
        return Sample(image, keep, ttft)
    (pruned,) = report["images"]
    if pruned["kept_tokens"] >= pruned["visual_tokens"]:
        raise RuntimeError(f"nothing was pruned: {report}")
    timings = {stage: (milliseconds or 0.0) / 1000 for stage, milliseconds in report["timings_ms"].items()}
    plan = timings["text"] + timings["budget"] + timings["select"]
    return Sample(image, keep, ttft, pruned["visual_tokens"], pruned["kept_tokens"], plan, timings["encode"])


@contextmanager
def server(model: Path, family: Family, *, stock: bool) -> Iterator[str]:
    options = [*OPTIONS, *family.options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(family.kv_cache), "HF_HUB_OFFLINE": "1"}
    if stock:
        with running_server(
            ["--model", str(model), *options], command=STOCK_COMMAND, environment={**environment, "VLLM_PLUGINS": ""}
        ) as url:
            yield url
    else:
        with running_server([str(model), *options], environment=environment) as url:
            yield url


def ask(url: str, image: str, keep: float | None) -> tuple[float, dict[str, Any] | None]:
    """Ask about an image. Returns the seconds until its only token has come, and the report (None: stock vLLM)."""
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": QUESTION}]
    body: dict[str, Any] = {
        "model": NAME,
        "max_tokens": 1,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    }
    if keep is not None:
        body["pruning"] = {"budget": {"type": "ratio", "keep": keep}}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=1200) as response:
        answer = json.load(response)
    return time.perf_counter() - started, answer.get("pruning")


def picture(seed: int, size: tuple[int, int]) -> str:
    """A picture that no other seed gives: smooth noise, as a data URL."""
    noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return data_url(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))


def summary(samples: list[Sample]) -> list[dict[str, Any]]:
    """One row for each size of image and share of tokens kept."""
    rows = []
    for image in dict.fromkeys(sample.image for sample in samples):
        stock = statistics.median(s.ttft for s in samples if s.image == image and s.keep is None)
        for keep in KEEPS:
            ours = [sample for sample in samples if sample.image == image and sample.keep == keep]
            ttft, plan = (statistics.median(values) for values in ([s.ttft for s in ours], [s.plan for s in ours]))
            saved = stock - ttft + plan
            rows.append(
                {
                    "image": image,
                    "pixels": IMAGES[image],
                    "visual_tokens": ours[0].visual_tokens,
                    "keep": keep,
                    "kept_tokens": ours[0].kept_tokens,
                    "stock_s": stock,
                    "ours_s": ttft,
                    "encode_s": statistics.median(s.encode for s in ours),
                    "plan_s": plan,
                    "plan_share": plan / saved if saved > 0 else None,
                }
            )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    share = "nothing saved" if row["plan_share"] is None else f"{row['plan_share']:.1%} of the saving"
    return (
        f"{row['family']} {row['size']:5} {row['image']:10} {row['kept_tokens']:5} of {row['visual_tokens']:5}  "
        f"stock {row['stock_s']:7.2f} s  ours {row['ours_s']:7.2f} s ({row['stock_s'] / row['ours_s']:.2f} x)  "
        f"encode {row['encode_s']:6.2f} s  plan {row['plan_s']:6.3f} s, {share}"
    )


if __name__ == "__main__":
    main()

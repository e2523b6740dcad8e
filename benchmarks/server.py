"""Throughput and time to first token under load, stock vLLM against this project, on one machine in one run.

    python -m benchmarks.server                                            # half an hour on an idle machine
    python -m benchmarks.server --size tiny --pairs 1 --concurrency 1 4 --requests 4    # to see that it works

Both servers run all the time, and each measurement loads one of them: a number of clients that each ask about a picture
never seen before, again and again, and read the stream. What is compared, at each concurrency:

- stock:     stock vLLM
- off:       our server with ``pruning: false``
- balanced:  our server at the preset ``balanced``

A pair holds one measurement of each kind, on the same pictures; which kind comes first rotates from pair to pair. The
checkpoint has random weights, and its answers are cut at a few tokens, so that prefill dominates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.statistics import PairedRatio, paired_ratio
from benchmarks.ttft import NAME, QUESTION, STOCK_COMMAND, machine, picture
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_server.process import running_server

KINDS = ("stock", "off", "balanced")
OPTIONS = (
    "--served-model-name", NAME, "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "32",
    "--no-enable-prefix-caching", "--enforce-eager", "--disable-uvicorn-access-log", "--load-format", "dummy",
)  # fmt: skip
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
ANSWER_TOKENS = 4
IMAGE_SIDE = 336  # pixels


@dataclass(frozen=True)
class Measurement:
    """One kind of request under load.

    Attributes:
        per_second: requests finished per second.
        ttft: seconds to the first token, the median over the requests.
        tokens: prompt tokens of a request, the mean.
        batch: images per run of our vision encoder, the mean; None where it did not run.
    """

    per_second: float
    ttft: float
    tokens: float
    batch: float | None


Samples = dict[int, dict[str, list[Measurement]]]  # by concurrency and kind, pair by pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "tiny"], default="small", help="of the model (default: small)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="clients (default: 1 8 32)")
    parser.add_argument("--pairs", type=int, default=6, help="measurements of each kind (default: 6)")
    parser.add_argument("--requests", type=int, default=16, help="per measurement, at least (default: 16)")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        model = write_llava_checkpoint(directory, size=args.size, weights=False)
        with servers(model) as urls:
            samples = measure(urls, args.concurrency, pairs=args.pairs, requests=args.requests)
    result = {"size": args.size, "machine": machine(), "concurrency": summary(samples)}
    print(table(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def servers(model: Path) -> Iterator[dict[str, str]]:
    """The address to ask for each kind, while the servers run."""
    stock = ["--model", str(model), *OPTIONS]
    with (
        running_server(stock, command=STOCK_COMMAND, environment={**ENVIRONMENT, "VLLM_PLUGINS": ""}) as theirs,
        running_server([str(model), *OPTIONS], environment=ENVIRONMENT) as ours,
    ):
        yield {"stock": theirs, "off": ours, "balanced": ours}


def measure(urls: dict[str, str], concurrency: Sequence[int], *, pairs: int, requests: int) -> Samples:
    """Every kind at every concurrency, ``pairs`` times, after one short run of each that is not counted."""
    samples: Samples = {clients: {kind: [] for kind in KINDS} for clients in concurrency}
    for kind in KINDS:
        load(urls[kind], kind, [picture(seed, IMAGE_SIDE) for seed in range(4)], clients=2)
    for pair in range(pairs):
        for clients in concurrency:
            first = 1_000_000 * (pair + 1) + 10_000 * clients
            count = max(requests, 2 * clients)
            pictures = [picture(seed, IMAGE_SIDE) for seed in range(first, first + count)]
            for turn in range(len(KINDS)):
                kind = KINDS[(pair + turn) % len(KINDS)]
                samples[clients][kind].append(load(urls[kind], kind, pictures, clients=clients))
            shown = ", ".join(f"{kind} {samples[clients][kind][-1].per_second:.2f}/s" for kind in KINDS)
            print(f"pair {pair + 1}, {clients} clients: {shown}", file=sys.stderr, flush=True)
    return samples


def load(url: str, kind: str, pictures: Sequence[str], *, clients: int) -> Measurement:
    """Ask about each picture once, so many at a time."""
    limits = httpx.Limits(max_connections=clients)
    with httpx.Client(base_url=url, timeout=600, limits=limits) as client, ThreadPoolExecutor(clients) as threads:
        before = encoded(client)
        started = time.perf_counter()
        answers = list(threads.map(asker(client, kind), pictures))
        elapsed = time.perf_counter() - started
        runs, images = (now - then for now, then in zip(encoded(client), before, strict=True))
    return Measurement(
        per_second=len(pictures) / elapsed,
        ttft=statistics.median(ttft for ttft, _ in answers),
        tokens=statistics.fmean(tokens for _, tokens in answers),
        batch=images / runs if runs else None,
    )


def asker(client: httpx.Client, kind: str) -> Callable[[str], tuple[float, int]]:
    """A function that asks about a picture, and returns the seconds to the first token and the prompt's length."""
    policy: dict[str, Any] = {"off": {"pruning": False}, "balanced": {"pruning": "balanced"}}.get(kind, {})

    def ask(image: str) -> tuple[float, int]:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": QUESTION}]
        body = {
            "model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": ANSWER_TOKENS,
            "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, **policy,
        }  # fmt: skip
        started = time.perf_counter()
        ttft, tokens = None, 0
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{kind}: {answer.read().decode()[:500]}")
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if ttft is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                    ttft = time.perf_counter() - started
                if chunk.get("usage"):
                    tokens = chunk["usage"]["prompt_tokens"]
        if ttft is None:
            ttft = time.perf_counter() - started  # a model of random weights may say nothing that is text
        return ttft, tokens

    return ask


def encoded(client: httpx.Client) -> tuple[float, float]:
    """Runs of our vision encoder so far, and the images in them; nothing on stock vLLM."""
    values = {"count": 0.0, "sum": 0.0}
    for line in client.get("/metrics").text.splitlines():
        for name in values:
            if line.startswith(f"vtprune:encode_batch_size_{name}{{"):
                values[name] += float(line.rpartition(" ")[2])
    return values["count"], values["sum"]


def summary(samples: Samples) -> dict[str, Any]:
    """Ratios of what was measured at each concurrency, and what they were made of."""
    return {str(clients): summary_at(kinds) for clients, kinds in samples.items()}


def summary_at(kinds: dict[str, list[Measurement]]) -> dict[str, Any]:
    rates = {kind: [one.per_second for one in measured] for kind, measured in kinds.items()}
    ttfts = {kind: [one.ttft for one in measured] for kind, measured in kinds.items()}
    batches = [one.batch for one in kinds["balanced"] if one.batch is not None]
    return {
        "off / stock, requests per second": asdict(paired_ratio(rates["off"], rates["stock"])),
        "balanced / stock, requests per second": asdict(paired_ratio(rates["balanced"], rates["stock"])),
        "off / stock, time to first token": asdict(paired_ratio(ttfts["off"], ttfts["stock"])),
        "balanced / stock, time to first token": asdict(paired_ratio(ttfts["balanced"], ttfts["stock"])),
        "encode batch": statistics.fmean(batches) if batches else None,
        "samples": {kind: [asdict(one) for one in measured] for kind, measured in kinds.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for clients, summed in result["concurrency"].items():
        lines.append(f"{clients} clients")
        for kind, measured in summed["samples"].items():
            rate, ttft, tokens = (
                statistics.median(one[key] for one in measured) for key in ("per_second", "ttft", "tokens")
            )
            lines.append(f"  {kind:10} {rate:7.2f} requests/s, {ttft:.3f} s to the first token, {tokens:.0f} tokens")
        for name, ratio in summed.items():
            if isinstance(ratio, dict) and "pairs" in ratio:
                lines.append(f"  {name:40} {PairedRatio(**ratio)}")
        if summed["encode batch"] is not None:
            lines.append(f"  {'images per run of the encoder':40} {summed['encode batch']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Time to first token of LLaVA, stock vLLM against this project, on one machine in one run.

    python -m loadtests.ttft         # LLaVA-1.5-7B shapes, random weights: needs 20 GB of memory
    python -m loadtests.ttft --size tiny --rounds 1 --pairs 2      # a minute, to see that it works

One machine may not hold both servers, so they take turns: each round starts stock vLLM, measures, stops it, then
starts ours. The i-th measurements of the two servers in a round use the same picture and form a pair. Within a server
the kinds of request alternate. What is compared:

- stock:  a picture and a question on stock vLLM                       (all 576 visual tokens)
- off:    the same on our server with ``pruning: false``
- cold:   the same on our server with ``--keep`` tokens, a picture never seen before
- hit:    the same again under another policy: the features are cached, the selection is not
- S(n):   a text prompt of n tokens on stock vLLM, n being the length of the stock and of the pruned prompt
- E:      the vision encoder and projector of transformers, on the picture's pixels, in this process

The ideal speed-ups are those of a selection that costs nothing: (E + S(stock length)) / (E + S(pruned length)) for a
picture never seen, (E + S(stock length)) / S(pruned length) for one whose features are cached.
``off_over_cold`` and ``off_over_hit`` compare requests to one server, seconds apart: surer on a busy host.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig, CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from loadtests.servers import MODEL, server
from loadtests.workload import picture
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_evaluation.load.client import ask, connect
from vllm_vtprune_evaluation.load.machine import machine
from vllm_vtprune_evaluation.load.ratios import PairedRatio, paired_ratio
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.messages import message

QUESTION = "What is in the picture?"
VISUAL_TOKENS = 576
OPTIONS = tuple("--dtype bfloat16 --max-model-len 1024 --max-num-seqs 4 --no-enable-prefix-caching".split())
TIMEOUT = 600  # seconds

Samples = dict[str, list[float]]  # seconds, by kind
Request = Callable[[str], float]  # a picture -> seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7b", "tiny"], default="7b", help="shapes of the model (default: 7b)")
    parser.add_argument("--keep", type=int, default=128, help="visual tokens kept of 576 (default: 128)")
    parser.add_argument("--rounds", type=int, default=2, help="how often the servers take turns (default: 2)")
    parser.add_argument("--pairs", type=int, default=6, help="measured pairs in each round (default: 6)")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        model = write_llava_checkpoint(directory, size=args.size, weights=False, dtype="bfloat16")
        samples = measure(model, keep=args.keep, rounds=args.rounds, pairs=args.pairs)
    result = summary(samples, keep=args.keep) | {"size": args.size, "machine": machine(), "samples_s": samples}
    print(table(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: Path, *, keep: int, rounds: int, pairs: int) -> Samples:
    """Measure every kind of request, pair by pair; seconds."""
    samples: Samples = {}
    encode = encoder_of(model)
    pixels = AutoConfig.from_pretrained(model).vision_config.image_size
    for turn in range(1, rounds + 1):
        pictures = [picture(turn * 1000 + index, (pixels, pixels)) for index in range(pairs + 1)]
        with server(model, OPTIONS, stock=True, kv_cache_gb=2) as url, connect(url, timeout=TIMEOUT) as client:
            prompt_tokens = ask_about(client, pictures[-1]).input_tokens
            assert prompt_tokens is not None, "vLLM counts the tokens of a prompt"
            kinds = stock_requests(client, prompt_tokens, keep) | {"E": lambda _: encode()}
            take_turns(kinds, pictures, samples, label=f"round {turn}, stock vLLM")
        with server(model, OPTIONS, stock=False, kv_cache_gb=2) as url, connect(url, timeout=TIMEOUT) as client:
            take_turns(our_requests(client, keep), pictures, samples, label=f"round {turn}, ours")
    return samples


def stock_requests(client: httpx.Client, prompt_tokens: int, keep: int) -> dict[str, Request]:
    """The kinds of request to stock vLLM; ``prompt_tokens`` is the length of a prompt with one picture."""
    return {
        "stock": lambda image: seconds(ask_about(client, image)),
        "S_stock": lambda _: seconds(ask_tokens(client, prompt_tokens)),
        "S_pruned": lambda _: seconds(ask_tokens(client, prompt_tokens - VISUAL_TOKENS + keep)),
    }


def our_requests(client: httpx.Client, keep: int) -> dict[str, Request]:
    """The kinds of request to our server; "cold" must precede "hit" of the same picture."""
    budget = {"type": "tokens", "keep": keep}
    return {
        "off": lambda image: seconds(ask_about(client, image, False)),
        "cold": lambda image: seconds(ask_about(client, image, {"budget": budget})),
        "hit": lambda image: seconds(ask_about(client, image, {"budget": budget, "alpha": 0.5})),
    }


def take_turns(kinds: dict[str, Request], pictures: Sequence[str], samples: Samples, *, label: str) -> None:
    """Warm up with the last picture, then measure each kind for every other picture.

    The first kind alternates between being first and last.
    """
    for request in kinds.values():
        request(pictures[-1])
    first, *others = kinds
    for index, image in enumerate(pictures[:-1]):
        for kind in (first, *others) if index % 2 == 0 else (*others, first):
            samples.setdefault(kind, []).append(kinds[kind](image))
        times = ", ".join(f"{kind} {samples[kind][-1]:.3f} s" for kind in kinds)
        print(f"{label}, pair {index + 1}: {times}", file=sys.stderr, flush=True)


def ask_about(client: httpx.Client, image: str, policy: object | None = None) -> Record:
    """Ask about a picture. The record's `e2e` is the time to the only token, which may have no text.

    Raises:
        RuntimeError: the request failed, or a policy that prunes dropped no token.
    """
    body: dict[str, Any] = {"messages": [message(QUESTION, [image])]}
    if policy is not None:
        body["pruning"] = policy
    record = only_token(client, body)
    if policy and not (record.keep_ratio or 1) < 1:
        raise RuntimeError(f"nothing was pruned: {record.pruning}")
    return record


def ask_tokens(client: httpx.Client, length: int) -> Record:
    """Generate one token after a random text prompt of ``length`` tokens."""
    prompt = [random.randrange(3, 2000) for _ in range(length)]
    return only_token(client, {"prompt": prompt}, path="/v1/completions")


def only_token(client: httpx.Client, body: dict[str, Any], path: str = "/v1/chat/completions") -> Record:
    record = ask(client, "one token", {**body, "model": MODEL, "max_tokens": 1, "temperature": 0}, path=path)
    if record.error or record.e2e is None:
        raise RuntimeError(record.error or "an answer without a token")
    return record


def seconds(record: Record) -> float:
    """Seconds to the only token."""
    assert record.e2e is not None  # by `only_token`
    return record.e2e


def encoder_of(model: Path) -> Callable[[], float]:
    """A function that runs transformers' encoder (up to LLaVA's layer) and projector once and returns the seconds."""
    config = AutoConfig.from_pretrained(model)
    vision_config = config.vision_config
    vision_config.num_hidden_layers += 1 + config.vision_feature_layer
    vision = CLIPVisionModel._from_config(vision_config, dtype=torch.bfloat16).eval()
    projector = LlavaMultiModalProjector(config).to(torch.bfloat16).eval()
    pixels = torch.randn(1, 3, vision_config.image_size, vision_config.image_size, dtype=torch.bfloat16)
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    @torch.inference_mode()
    def encode() -> float:
        started = time.perf_counter()
        projector(vision(pixels).last_hidden_state[:, 1:])
        return time.perf_counter() - started

    return encode


def summary(samples: Samples, *, keep: int) -> dict[str, Any]:
    """The ratios, each a `PairedRatio` as a dict."""
    unpruned = [encoder + full for encoder, full in zip(samples["E"], samples["S_stock"], strict=True)]
    ideal = [encoder + pruned for encoder, pruned in zip(samples["E"], samples["S_pruned"], strict=True)]
    ratios: dict[str, PairedRatio] = {
        "speedup_cold": paired_ratio(samples["stock"], samples["cold"]),
        "ideal_cold": paired_ratio(unpruned, ideal),
        "share_of_ideal": paired_ratio(products(samples["stock"], ideal), products(samples["cold"], unpruned)),
        "speedup_hit": paired_ratio(samples["stock"], samples["hit"]),
        "ideal_hit": paired_ratio(unpruned, samples["S_pruned"]),
        "off_over_cold": paired_ratio(samples["off"], samples["cold"]),
        "off_over_hit": paired_ratio(samples["off"], samples["hit"]),
        "off_over_stock": paired_ratio(samples["off"], samples["stock"]),
    }
    return {"keep": keep, "visual_tokens": VISUAL_TOKENS, "ratios": {name: asdict(r) for name, r in ratios.items()}}


def products(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a * b for a, b in zip(left, right, strict=True)]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    ratios = [f"{name:16}  {PairedRatio(**ratio)}" for name, ratio in result["ratios"].items()]
    times = [f"{kind:16}  median {statistics.median(times):.3f} s" for kind, times in result["samples_s"].items()]
    return "\n".join([f"{'':16}  mean of pairs, 95 % interval", *ratios, *times])


if __name__ == "__main__":
    main()

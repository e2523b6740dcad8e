"""Time to first token of LLaVA, stock vLLM against this project, on one machine in one run.

    python -m benchmarks.ttft         # LLaVA-1.5-7B shapes, random weights: needs 20 GB of memory
    python -m benchmarks.ttft --size tiny --rounds 1 --pairs 2      # a minute, to see that it works

One machine may not hold both servers, so they take turns: each round starts stock vLLM, measures, stops it, then
starts ours. The i-th measurements of the two servers in a round use the same picture and form a pair. Within a server
the kinds of request alternate. What is compared:

- stock:  a picture and a question on stock vLLM                       (all 576 visual tokens)
- off:    the same on our server with ``pruning: false``
- cold:   the same on our server with ``--keep`` tokens, a picture never seen before
- hit:    the same again under another policy: the features are at hand, the selection is not
- S(n):   a text prompt of n tokens on stock vLLM, n being the length of the stock and of the pruned prompt
- E:      the vision encoder and projector of transformers, on the picture's pixels, in this process

The ideal speed-ups are those of a selection that costs nothing: (E + S(stock length)) / (E + S(pruned length)) for a
picture never seen, (E + S(stock length)) / S(pruned length) for one whose features are at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from benchmarks.machine import machine
from benchmarks.statistics import PairedRatio, paired_ratio
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_evaluation.photo import data_url
from vllm_vtprune_server.process import running_server

NAME = "llava"
QUESTION = "What is in the picture?"
VISUAL_TOKENS = 576
STOCK_COMMAND = ("-m", "vllm.entrypoints.openai.api_server")
OPTIONS = (
    "--served-model-name", NAME, "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "4",
    "--no-enable-prefix-caching", "--enforce-eager", "--disable-uvicorn-access-log",
)  # fmt: skip
TARGETS = {"share_of_ideal": 0.9, "speedup_hit": 3.8, "off_over_stock": 1.0}

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
    """Seconds of every kind of request, pair by pair."""
    samples: Samples = {}
    encode = encoder_of(model)
    pixels = AutoConfig.from_pretrained(model).vision_config.image_size
    for turn in range(1, rounds + 1):
        pictures = [picture(turn * 1000 + index, pixels) for index in range(pairs + 1)]
        with server(model, stock=True) as url:
            prompt_tokens = ask(url, pictures[-1], None)[1]
            kinds = stock_requests(url, prompt_tokens, keep) | {"E": lambda _: encode()}
            take_turns(kinds, pictures, samples, label=f"round {turn}, stock vLLM")
        with server(model, stock=False) as url:
            take_turns(our_requests(url, keep), pictures, samples, label=f"round {turn}, ours")
    return samples


def stock_requests(url: str, prompt_tokens: int, keep: int) -> dict[str, Request]:
    """The kinds of request to stock vLLM; ``prompt_tokens`` is the length of a prompt with one picture."""
    return {
        "stock": lambda image: ask(url, image, None)[0],
        "S_stock": lambda _: ask_tokens(url, prompt_tokens),
        "S_pruned": lambda _: ask_tokens(url, prompt_tokens - VISUAL_TOKENS + keep),
    }


def our_requests(url: str, keep: int) -> dict[str, Request]:
    """The kinds of request to our server; "cold" of a picture has to come before its "hit"."""
    budget = {"type": "tokens", "keep": keep}
    return {
        "off": lambda image: ask(url, image, False)[0],
        "cold": lambda image: ask(url, image, {"budget": budget})[0],
        "hit": lambda image: ask(url, image, {"budget": budget, "alpha": 0.5})[0],
    }


def take_turns(kinds: dict[str, Request], pictures: Sequence[str], samples: Samples, *, label: str) -> None:
    """One warm-up with the last picture, then a measurement of each kind for each other picture.

    The first kind opens every other pair and closes those between.
    """
    for request in kinds.values():
        request(pictures[-1])
    first, *others = kinds
    for index, image in enumerate(pictures[:-1]):
        for kind in (first, *others) if index % 2 == 0 else (*others, first):
            samples.setdefault(kind, []).append(kinds[kind](image))
        shown = ", ".join(f"{kind} {samples[kind][-1]:.3f} s" for kind in kinds)
        print(f"{label}, pair {index + 1}: {shown}", file=sys.stderr, flush=True)


@contextmanager
def server(model: Path, *, stock: bool) -> Iterator[str]:
    options = [*OPTIONS, "--load-format", "dummy"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    if stock:
        with running_server(
            ["--model", str(model), *options],
            command=STOCK_COMMAND,
            environment={**environment, "VLLM_PLUGINS": ""},
        ) as url:
            yield url
    else:
        with running_server([str(model), *options], environment=environment) as url:
            yield url


def ask(url: str, image: str, policy: object | None) -> tuple[float, int]:
    """Ask about an image. Returns the seconds until its only token has come, and the length of the prompt in tokens."""
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": QUESTION}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    if policy is not None:
        body["pruning"] = policy
    seconds, answer = post(f"{url}/v1/chat/completions", body)
    if policy:
        (report,) = answer["pruning"]["images"]
        if report["kept_tokens"] >= report["visual_tokens"]:
            raise RuntimeError(f"nothing was pruned: {report}")
    return seconds, answer["usage"]["prompt_tokens"]


def ask_tokens(url: str, length: int) -> float:
    """Seconds until the first token after a text prompt of that many tokens."""
    prompt = [random.randrange(3, 2000) for _ in range(length)]
    return post(f"{url}/v1/completions", {"prompt": prompt})[0]


def post(url: str, body: dict[str, Any]) -> tuple[float, Any]:
    data = json.dumps({**body, "model": NAME, "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    return time.perf_counter() - started, answer


def encoder_of(model: Path) -> Callable[[], float]:
    """A function that runs transformers' encoder, up to LLaVA's layer, and projector once, and returns the seconds."""
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


def picture(seed: int, pixels: int) -> str:
    """A picture that no other seed gives: smooth noise, as a data URL."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return data_url(Image.fromarray(noise).resize((pixels, pixels), Image.Resampling.BICUBIC))


def summary(samples: Samples, *, keep: int) -> dict[str, Any]:
    """Ratios of what was measured, as `PairedRatio` in plain numbers."""
    unpruned = [encoder + full for encoder, full in zip(samples["E"], samples["S_stock"], strict=True)]
    ideal = [encoder + pruned for encoder, pruned in zip(samples["E"], samples["S_pruned"], strict=True)]
    ratios: dict[str, PairedRatio] = {
        "speedup_cold": paired_ratio(samples["stock"], samples["cold"]),
        "ideal_cold": paired_ratio(unpruned, ideal),
        "share_of_ideal": paired_ratio(products(samples["stock"], ideal), products(samples["cold"], unpruned)),
        "speedup_hit": paired_ratio(samples["stock"], samples["hit"]),
        "ideal_hit": paired_ratio(unpruned, samples["S_pruned"]),
        "off_over_stock": paired_ratio(samples["off"], samples["stock"]),
    }
    return {"keep": keep, "visual_tokens": VISUAL_TOKENS, "ratios": {name: asdict(r) for name, r in ratios.items()}}


def products(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a * b for a, b in zip(left, right, strict=True)]


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'':16}  mean of pairs, 95 % interval   target"]
    for name, ratio in result["ratios"].items():
        target = TARGETS.get(name)
        shown = "" if target is None else f"{'at most' if name == 'off_over_stock' else 'at least'} {target}"
        lines.append(f"{name:16}  {PairedRatio(**ratio)!s:28}  {shown}")
    for kind, seconds in result["samples_s"].items():
        lines.append(f"{kind:16}  median {float(np.median(seconds)):.3f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

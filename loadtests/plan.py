"""What a plan costs: of the prefill that it saves, and beside the papers' pipeline, on one machine in one run.

    python -m loadtests.plan --saved           # every preset, against the prefill that it saves: ten minutes
    python -m loadtests.plan                   # all shapes, one and two threads: more than ten minutes
    python -m loadtests.plan --methods         # one image of 576 tokens, every method
    python -m loadtests.plan --tokens 10000    # a page in Qwen2.5-VL-3B; not among the default shapes

``--saved``: the goal is a plan that costs at most 5 % of the prefill that it saves. Both are CPU seconds of this
process on one thread, so that other processes disturb them little. The prefill is a float32 forward pass of the
decoder's layers over the image's tokens and 64 text tokens: one layer with random weights is timed once, times the
number of layers. Embedding, positions, output head, serving and the vision encoder are not included.

Otherwise, for each shape, spectrum and number of threads, the two pipelines take turns on the same features; the
median of the turns is printed. ``min_tokens = max_tokens`` fixes the number of kept tokens; the energy is still
computed, at the threshold 0.99.

- literal: the randomised SVD of E-AdaPrune (300 components, two power steps, more components until the threshold is
  reached), then ResPrune by Gram-Schmidt on the full vectors
- ours: :func:`vllm_vtprune.plan_tokens`, including its input checks

Spectra of F, before a shared direction that holds half of the energy is added: ``exponential``, the k-th energy is
``exp(-k / (0.1 N))``; ``power``, it is ``k^-1.2``. V is a random two-layer projector of F.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, normalize, rms_norm, scaled_dot_product_attention, silu

from loadtests.workload import grid_of
from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.budget import spectrum
from vllm_vtprune.selectors import SELECTORS
from vllm_vtprune.selectors.resprune import ALPHA
from vllm_vtprune_evaluation.load.machine import machine

THRESHOLD = 0.99
SHAPES = {  # (tokens, encoder's width, language model's width): kept
    (576, 1024, 4096): (64, 128, 192),
    (2880, 1024, 4096): (320, 640),
    (4096, 3584, 3584): (455, 910, 1365),
    (10_000, 2048, 2048): (1111,),
}
SPECTRA = ("exponential", "power")
PRESETS = ("quality", "balanced", "fast", "document")
TEXT = 64


class Decoder(NamedTuple):
    """Shape of a language model."""

    layers: int
    width: int
    heads: int
    key_heads: int
    feed_forward: int


SEVEN, THREE, HALF = (
    Decoder(32, 4096, 32, 32, 11008),
    Decoder(36, 2048, 16, 2, 11008),
    Decoder(24, 896, 14, 2, 4864),
)
SAVED = (  # model, tokens of an image, encoder's width
    ("LLaVA-1.5-7B", SEVEN, 576, 1024),
    ("LLaVA-NeXT-7B", SEVEN, 2880, 1024),
    ("Qwen2.5-VL-3B", THREE, 10_000, 2048),
    ("Qwen2-0.5B", HALF, 576, 1024),
    ("Qwen2-0.5B", HALF, 2880, 1024),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns of each measurement (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880, 4096], help="shapes, by tokens")
    parser.add_argument("--methods", action="store_true", help="time every method instead")
    parser.add_argument(
        "--saved", action="store_true", help="time the presets against the prefill that they save instead"
    )
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    args = parser.parse_args()
    rows = saved(args) if args.saved else methods(args) if args.methods else pipelines(args)
    if args.out is not None:
        args.out.write_text(json.dumps({"machine": machine(), "turns": args.turns, "rows": rows}, indent=1) + "\n")


def pipelines(args: argparse.Namespace) -> list[dict[str, Any]]:
    print("tokens  spectrum     k* at 0.99  kept  threads | literal budget+select | ours budget+select | literal/ours")
    rows = []
    for (n, encoder_width, width), kept in SHAPES.items():
        if n not in args.tokens:
            continue
        for name in SPECTRA:
            features, text = image(n, encoder_width, width, name)
            rank = spectrum(features.encoder, THRESHOLD, "exact").rank_at(THRESHOLD)
            for threads in args.threads:
                torch.set_num_threads(threads)
                for k in kept:
                    row = {"tokens": n, "spectrum": name, "rank": rank, "kept": k, "threads": threads}
                    row |= pipeline(features, text, k, args.turns)
                    rows.append(row)
                    print(line(row), flush=True)
    return rows


def pipeline(features: VisualFeatures, text: Tensor, k: int, turns: int) -> dict[str, Any]:
    """Milliseconds by stage of the literal pipeline and of ours, and how many picks are the same."""
    policy = PruningPolicy.parse(
        {"budget": {"type": "energy", "threshold": THRESHOLD, "min_tokens": k, "max_tokens": k}}
    )
    F, V = features.encoder, features.embeds
    assert features.cls_attention is not None
    seed = int(features.cls_attention.argmax())
    generator = torch.Generator().manual_seed(0)
    stages: list[dict[str, float]] = []
    samples: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        samples.setdefault(name, []).append((time.perf_counter() - started) * 1e3)
        return result

    for _ in range(turns + 1):  # the first warms up
        timed("literal_budget", lambda: literal_rank(F, generator))
        expected = timed("literal_select", lambda: literal_picks(V, text, seed, k))
        plan = timed("ours", lambda: plan_tokens(features, policy, text))
        stages.append(plan.timings)
    median = {name: statistics.median(times[1:]) for name, times in samples.items()}
    same = sum(a == b for a, b in zip(expected.tolist(), plan.order.tolist(), strict=True))
    return {
        "literal_ms": [median["literal_budget"], median["literal_select"]],
        "ours_ms": [statistics.median(t[stage] * 1e3 for t in stages[1:]) for stage in ("budget", "select")],
        "ours_all_ms": median["ours"],
        "times_faster": (median["literal_budget"] + median["literal_select"]) / median["ours"],
        "picks_as_literal": same,
    }


def line(row: dict[str, Any]) -> str:
    literal, plan = row["literal_ms"], row["ours_ms"]
    return (
        f"{row['tokens']:6}  {row['spectrum']:11}  {row['rank']:10}  {row['kept']:4}  {row['threads']:7} | "
        f"{literal[0]:8.1f} + {literal[1]:7.1f} ms | {plan[0]:6.1f} + {plan[1]:6.1f} ms | "
        f"{row['times_faster']:12.2f}   "
        f"{row['picks_as_literal']} of {row['kept']} picks as literal"
    )


def saved(args: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU seconds of a plan and of the prefill that the plan saves, by model and preset."""
    torch.set_num_threads(1)
    rows = []
    for model, decoder, n, encoder_width in SAVED:
        features, text = image(n, encoder_width, decoder.width, "exponential")
        unpruned = prefill_seconds(decoder, n + TEXT)
        for preset in PRESETS:
            times = []
            for _ in range(args.turns + 1):
                started = time.process_time()
                plan = plan_tokens(features, PruningPolicy.parse(preset), text)
                times.append(time.process_time() - started)
            spent, less = statistics.median(times[1:]), unpruned - prefill_seconds(decoder, plan.budget + TEXT)
            row = {"model": model, "tokens": n, "preset": preset, "kept": plan.budget}
            rows.append(row | {"plan_s": spent, "prefill_s": unpruned, "saved_s": less, "share": spent / less})
            print(
                f"{model:14} {n:6} tokens  {preset:9} keeps {plan.budget:5}: plan {spent:8.3f} s, "
                f"saves {less:8.2f} of {unpruned:8.2f} s of prefill: {spent / less:7.2%}",
                flush=True,
            )
    return rows


@torch.no_grad()
def prefill_seconds(decoder: Decoder, tokens: int) -> float:
    """CPU seconds of a forward pass over ``tokens``: one layer's time, times the number of layers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[0] ** -0.5

    width, size = decoder.width, decoder.width // decoder.heads
    heads = [decoder.heads, decoder.key_heads, decoder.key_heads]
    into_heads, out_of_heads = random(width, size * sum(heads)), random(width, width)
    up, down = random(width, 2 * decoder.feed_forward), random(decoder.feed_forward, width)

    def layer(x: Tensor) -> Tensor:
        joint = (rms_norm(x, (width,)) @ into_heads).view(1, len(x), -1, size).transpose(1, 2)
        query, key, value = torch.split(joint, heads, dim=1)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + seen.transpose(1, 2).reshape(len(x), width) @ out_of_heads
        gate, raised = (rms_norm(x, (width,)) @ up).chunk(2, dim=1)
        return x + (silu(gate) * raised) @ down

    x = random(tokens, width)
    layer(x[:TEXT])  # warms up
    started = time.process_time()
    layer(x)
    return (time.process_time() - started) * decoder.layers


def methods(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds for one image of LLaVA-1.5's shape, 128 of 576 tokens kept, by method."""
    features, text = image(576, 1024, 4096, "exponential")
    rows = []
    threads = args.threads[-1]
    torch.set_num_threads(threads)
    for name, spec in SELECTORS.items():
        keep = min(128, spec.max_keep(features))
        policy = PruningPolicy.parse({"method": name, "budget": {"type": "tokens", "keep": keep}})
        times = []
        for _ in range(args.turns + 1):
            started = time.perf_counter()
            plan_tokens(features, policy, text)
            times.append((time.perf_counter() - started) * 1e3)
        rows.append({"method": name, "kept": keep, "threads": threads, "ms": statistics.median(times[1:])})
        print(f"{name:12} {keep:4} of 576  {rows[-1]['ms']:8.2f} ms, {threads} threads", flush=True)
    return rows


def image(n: int, encoder_width: int, width: int, name: str) -> tuple[VisualFeatures, Tensor]:
    """Features of one image, and a text of three nouns; the same for the same arguments."""
    print(f"making {n} tokens with {name} spectrum", file=sys.stderr, flush=True)
    generator = torch.Generator().manual_seed(0)
    side = min(n, encoder_width)
    place = torch.arange(1, side + 1)
    energies = torch.exp(-place / (0.1 * n)) if name == "exponential" else place.float() ** -1.2
    left = torch.randn(n, side, generator=generator)
    right = torch.randn(side, encoder_width, generator=generator)
    F = (left * energies.sqrt()) @ right
    shared = torch.randn(1, encoder_width, generator=generator)
    F += shared * (F.norm() / (shared.norm() * n**0.5))
    inside = torch.randn(encoder_width, width, generator=generator)
    V = gelu(F @ inside / F.norm(dim=1).mean()) @ torch.randn(width, width, generator=generator)
    text = torch.randn(3, width, generator=generator) * V.std()
    attention = torch.rand(n, generator=generator)
    keys = torch.randn(n, 64, generator=generator)
    return VisualFeatures(F, V, grid_of(n), cls_attention=attention, keys=keys), text


def literal_rank(F: Tensor, generator: torch.Generator, components: int = 300, power_steps: int = 2) -> int:
    """E-AdaPrune, Algorithms 1 and 2; with more components where they do not reach the threshold."""
    while True:
        components = min(components, *F.shape)
        basis = torch.linalg.qr(F @ torch.randn(F.shape[1], components, generator=generator)).Q
        for _ in range(power_steps):
            basis = torch.linalg.qr(F.T @ basis).Q
            basis = torch.linalg.qr(F @ basis).Q
        energies = torch.linalg.svdvals(basis.T @ F).square()
        reached = (energies.cumsum(0) / F.square().sum() >= THRESHOLD).nonzero()
        if len(reached):
            return int(reached[0]) + 1
        if components == min(F.shape):
            return components
        components *= 2


def literal_picks(V: Tensor, text: Tensor, seed: int, k: int) -> Tensor:
    """ResPrune, Eq. 10-16: each pick adds one orthonormal vector, onto which all tokens are projected."""
    cosines = normalize(V, dim=1) @ normalize(text, dim=1).T
    below = cosines.amax() - cosines.amax(dim=1)
    gate = (1 - 0.9 * below / below.amax().clamp(min=0.05)) ** ALPHA
    energy = V.square().sum(dim=1)
    basis = V.new_empty(k, V.shape[1])
    order = [seed]
    for step in range(k - 1):
        token = V[order[-1]]
        token = token - basis[:step].T @ (basis[:step] @ token)
        basis[step] = token / token.norm()
        energy = energy - (V @ basis[step]).square()
        scores = energy * gate
        scores[order] = -torch.inf
        order.append(int(scores.argmax()))
    return torch.tensor(order)


if __name__ == "__main__":
    main()

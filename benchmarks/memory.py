"""Whether a server's memory stays flat: thousands of requests on small caches, resident memory of each process.

    python -m benchmarks.memory                      # 2,000 requests, a few minutes on two cores
    python -m benchmarks.memory --requests 400

The caches are sized to be full by request 200: the feature cache, vLLM's processor and prefix caches, and the table of
reports. From there on, what a process holds may not grow. The requests are a fixed mixture: new pictures and ones seen
before, pruned by several methods and not at all, streams and whole answers, mistakes, and clients that hang up.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from vllm_vtprune_evaluation.photo import data_url
from vllm_vtprune_server.process import running_server

FULL_BY = 200  # requests
TOLERANCE = 0.05
FEATURE_CACHE_GB = 0.05  # some fifty pictures
CLIENTS = 4
OPTIONS = (
    "--max-model-len", "2048", "--enforce-eager", "--mm-processor-cache-gb", "0.02", "--block-size", "32",
    "--num-gpu-blocks-override", "256", "--disable-uvicorn-access-log",
)  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VTPRUNE_FEATURE_CACHE_GB": str(FEATURE_CACHE_GB),
    "VTPRUNE_REPORT_TABLE_SIZE": "100",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",  # else a thousand: one for each weight and number of tokens in a batch
}
POLICIES: tuple[object, ...] = (
    "balanced",
    "fast",
    {"budget": {"type": "tokens", "keep": 64}},
    {"method": "uniform", "budget": {"type": "ratio", "keep": 0.3}},
    {"method": "divprune", "budget": {"type": "tokens", "keep": 40}},
    {"method": "adaptprune", "budget": {"type": "tokens", "keep": 90}},
    False,
)


@dataclass(frozen=True)
class Process:
    """Resident memory of one process.

    Attributes:
        role: what it is, by its command line.
        mib: MiB after every 200 requests, from when the caches were full.
    """

    role: str
    mib: list[float]

    @property
    def grown(self) -> float:
        """From when the caches were full to the end, as a share of the former."""
        return self.mib[-1] / self.mib[0] - 1


@dataclass(frozen=True)
class Result:
    """What `measure` saw; bytes of the feature cache are the largest that the metric showed."""

    requests: int
    processes: list[Process]
    feature_cache_bytes: float
    feature_cache_limit: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help=f"more than {FULL_BY} (default: 2000)")
    parser.add_argument("--out", type=Path, help="also write the result to this file, as JSON")
    args = parser.parse_args()
    result = measure(args.requests)
    for process in result.processes:
        print(f"{process.role:32} {process.grown:+.1%}, MiB: {' '.join(f'{mib:.0f}' for mib in process.mib)}")
    print(f"feature cache: {result.feature_cache_bytes:.0f} of {result.feature_cache_limit:.0f} bytes")
    if args.out is not None:
        args.out.write_text(json.dumps(asdict(result), indent=1) + "\n")
    if max(process.grown for process in result.processes) > TOLERANCE:
        sys.exit(f"a process grew by more than {TOLERANCE:.0%}")


def measure(requests: int) -> Result:
    """Start a server, send it so many requests, and look at its memory when its caches are full and at the end."""
    with server() as url, httpx.Client(base_url=url, timeout=120) as client:
        root = server_process(url)
        cache = send(client, [body(index) for index in range(FULL_BY)])
        family = [root, *root.children(recursive=True)]
        seen = [resident(family)]
        for first in range(FULL_BY, requests, FULL_BY):
            cache = max(cache, send(client, [body(index) for index in range(first, min(first + FULL_BY, requests))]))
            seen.append(resident(family))
            print(f"{first + FULL_BY} requests", file=sys.stderr, flush=True)
        processes = [
            Process(role(process), list(mib)) for process, mib in zip(family, zip(*seen, strict=True), strict=True)
        ]
        return Result(requests, processes, cache, FEATURE_CACHE_GB * 2**30)


def resident(family: list[psutil.Process]) -> list[float]:
    """MiB of each process."""
    return [process.memory_info().rss / 2**20 for process in family]


@contextmanager
def server() -> Iterator[str]:
    with running_server(OPTIONS, environment=ENVIRONMENT) as url:
        yield url


def server_process(url: str) -> psutil.Process:
    port = url.rpartition(":")[2]
    [root] = [child for child in psutil.Process().children() if port in child.cmdline()]
    return root


def role(process: psutil.Process) -> str:
    """Its command line, cut, without the folder of its program."""
    command = process.cmdline()
    return " ".join([Path(program).name for program in command[:1]] + command[1:])[:32]


def body(index: int) -> dict[str, Any]:
    """The index-th request: the same in every run."""
    chance = random.Random(index)
    picture = index if index < 20 or chance.random() < 0.8 else chance.randrange(index)  # one in five was seen before
    image = data_url(Image.fromarray(np.random.default_rng(picture).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    if chance.random() < 0.05:
        image = image[:-9]
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": f"Where is it, {index}?"}]
    return {
        "messages": [{"role": "user", "content": content}],
        "pruning": "none such" if chance.random() < 0.05 else chance.choice(POLICIES),
        "stream": chance.random() < 0.5,
        "max_tokens": 8,
        "temperature": 0,
    }


def send(client: httpx.Client, bodies: list[dict[str, Any]]) -> float:
    """Send requests, a few at a time; returns the bytes of the feature cache afterwards."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        for status in clients.map(lambda one: ask(client, one), bodies):
            if status not in (200, 400):
                raise RuntimeError(f"a request was answered with status {status}")
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vtprune:feature_cache_bytes{"))


def ask(client: httpx.Client, request: dict[str, Any]) -> int:
    with client.stream("POST", "/v1/chat/completions", json=request) as answer:
        if request["stream"] and request["pruning"] == "fast":
            next(answer.iter_lines())  # and hang up
        else:
            answer.read()
        return answer.status_code


if __name__ == "__main__":
    main()

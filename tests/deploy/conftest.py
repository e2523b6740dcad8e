"""A server from the image's contents, under load, and a Prometheus that watches it; each started once."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from deploy.grafana.plot import Prometheus
from loadtests.observe import running_prometheus
from tests.support.chat import VISUAL_TOKENS, Body, Server, fresh_url, user
from tests.support.dockerfile import Image, build
from vllm_vtprune_server.process import running_server

ROOT = Path(__file__).parents[2]
LOAD_SECONDS = 20


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """What the Dockerfile makes, in a virtual environment."""
    return build(ROOT / "Dockerfile", tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def deployed(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The image's server on the checkpoint in the package, started as the production-stack chart does: `vllm serve`."""
    log = tmp_path_factory.mktemp("deployed") / "server.log"
    path = f"{image.root / 'opt/vtprune/bin'}:{image.bin}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    become = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    options = ["--max-model-len", "2048", "--enforce-eager"]
    with running_server(options, command=("-c", become, "vllm", "serve"), environment=environment, log=log) as url:
        yield Server(url, log)


@dataclass(frozen=True)
class Watched:
    """A Prometheus and the time in which the server that it watches was under load."""

    prometheus: Prometheus
    start: float
    end: float


@pytest.fixture(scope="session")
def watched(deployed: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Prometheus with our configuration and rules, but faster, after a load in which everything happened."""
    log = tmp_path_factory.mktemp("prometheus") / "prometheus.log"
    with running_prometheus(deployed.url, log=log) as prometheus:
        start = time.time()
        load(deployed, LOAD_SECONDS)
        yield Watched(prometheus, start, time.time())


def load(server: Server, seconds: float) -> None:
    """Requests of every kind, from two clients: pruned and unpruned, seen and unseen images, bypassed and refused."""
    deadline = time.monotonic() + seconds
    seen = fresh_url()
    counts = count(64)  # the plans of one image differ, so that its features are looked up for each

    def client() -> None:
        while time.monotonic() < deadline:
            for pruning in ("balanced", "fast", keep(300), False):
                server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=pruning)
            server.stream(messages=[user("Where is the bus?", seen)], pruning=keep(next(counts)))
            server.ask(messages=[user("Where is the cat?", seen)], pruning=keep(300))  # two blocks of the prefix cache
            bypassed = server.ask(messages=[user("Where is the cat?", fresh_url())], pruning=keep(VISUAL_TOKENS))
            assert bypassed["pruning"]["images"][0]["bypass_reason"] == "budget_not_below_tokens"
            refused = server.post({"messages": [user("Where?", seen)], "pruning": {"method": "no such"}})
            assert refused.status_code == 400
            broken = server.post({"messages": [user("Where?", "data:image/png;base64,AAAA")], "pruning": "fast"})
            assert broken.status_code == 400, json.dumps(broken.json())

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            client()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def keep(tokens: int) -> Body:
    return {"budget": {"type": "tokens", "keep": tokens}}

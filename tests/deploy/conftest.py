"""What a Dockerfile and Prometheus's rules say; and a server under load that Prometheus watches, started once."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from deploy.grafana.plot import Prometheus
from loadtests.observe import ENVIRONMENT, SERVE_OPTIONS, running_prometheus
from tests.support.chat import VISUAL_TOKENS, Server, by_energy, fresh_url, tokens, user
from tests.support.programs import ROOT
from vllm_vtprune_server.process import running_server

LOAD_SECONDS = 20


def values(dockerfile: Path, name: str, stage: str | None = None) -> list[str]:
    """What stands behind each instruction of this name, in all stages or one."""
    arguments, current = [], ""
    for line in DockerfileParser(str(dockerfile)).structure:
        if line["instruction"] == "FROM":
            current = line["value"].rsplit(" AS ", 1)[-1]
        if line["instruction"] == name and stage in (None, current):
            arguments.append(line["value"])
    return arguments


def prometheus_rules() -> list[dict[str, Any]]:
    """The recording rules and the alerts."""
    files = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


@dataclass(frozen=True)
class Watched:
    """A Prometheus and the time in which the server that it watches was under load."""

    prometheus: Prometheus
    start: float
    end: float


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Prometheus with our configuration and rules, but faster, after a load in which everything happened.

    The server is that of the demo model.
    """
    logs = tmp_path_factory.mktemp("watched")
    with (
        running_server(SERVE_OPTIONS, environment=ENVIRONMENT, log=logs / "server.log") as url,
        running_prometheus(url, log=logs / "prometheus.log") as prometheus,
    ):
        start = time.time()
        load(Server(url, logs / "server.log"), LOAD_SECONDS)
        yield Watched(prometheus, start, time.time())


def load(server: Server, seconds: float) -> None:
    """Requests of every kind, from two clients: pruned and unpruned, seen and unseen images, bypassed and refused."""
    deadline = time.monotonic() + seconds
    seen = fresh_url()
    counts = count(64)  # the plans of one image differ, so that its features are looked up for each

    def client() -> None:
        while time.monotonic() < deadline:
            for pruning in ("balanced", "fast", tokens(300), False):
                server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=pruning)
            server.stream(messages=[user("Where is the bus?", seen)], pruning=by_energy(next(counts)))
            # two blocks of the prefix cache
            server.ask(messages=[user("Where is the cat?", seen)], pruning=tokens(300))
            bypassed = server.ask(messages=[user("Where is the cat?", fresh_url())], pruning=tokens(VISUAL_TOKENS))
            assert bypassed["pruning"]["images"][0]["bypass_reason"] == "budget_not_below_tokens"
            refused = server.post({"messages": [user("Where?", seen)], "pruning": {"method": "no such"}})
            assert refused.status_code == 400
            broken = server.post({"messages": [user("Where?", "data:image/png;base64,AAAA")], "pruning": "fast"})
            assert broken.status_code == 400, json.dumps(broken.json())

    with ThreadPoolExecutor(2) as clients:
        for ended in [clients.submit(client) for _ in range(2)]:
            ended.result()

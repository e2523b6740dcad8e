"""What the processes of a server hold levels off once its caches are full."""

import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from loadtests.soak import ENVIRONMENT, FEATURE_CACHE_GB, OPTIONS, resident, role_of, server_processes
from loadtests.workload import picture
from tests.support.chat import Body, Server, user
from vllm_vtprune_server.process import running_server

FULL_BY = 400  # requests, until the caches are full
WINDOW = 1000  # requests, in which no process grows by more than TOLERANCE; a leak grows in every window
TOLERANCE = 0.02
REQUESTS = 6000  # the allocators' pools grow in steps, fewer and fewer, until then
BATCH = 200
CLIENTS = 4
POLICIES: tuple[object, ...] = (
    "balanced",
    "fast",
    {"budget": {"type": "tokens", "keep": 64}},
    {"method": "uniform", "budget": {"type": "ratio", "keep": 0.3}},
    {"method": "divprune", "budget": {"type": "tokens", "keep": 40}},
    {"method": "adaptprune", "budget": {"type": "tokens", "keep": 90}},
    False,
)


def body(index: int) -> Body:
    """One of a fixed mixture: new pictures and ones seen before, many policies, streams, mistakes."""
    chance = random.Random(index)
    seed = index if index < 20 or chance.random() < 0.8 else chance.randrange(index)  # one in five was seen before
    image = picture(seed, (64, 64))
    if chance.random() < 0.05:
        image = image[:-9]
    pruning = "none such" if chance.random() < 0.05 else chance.choice(POLICIES)
    stream = chance.random() < 0.5
    messages = [user(f"Where is it, {index}?", image)]
    return {"messages": messages, "pruning": pruning, "stream": stream, "max_tokens": 8, "temperature": 0}


def send(client: httpx.Client, indices: Iterable[int]) -> dict[int, int]:
    """Send requests, a few at a time, and hang up on some streams. Returns how many had which status."""

    def ask(request: Body) -> int:
        with client.stream("POST", "/v1/chat/completions", json=request) as answer:
            if request["stream"] and request["pruning"] == "fast":
                next(answer.iter_lines())
            else:
                answer.read()
            return answer.status_code

    with ThreadPoolExecutor(CLIENTS) as clients:
        statuses = list(clients.map(ask, map(body, indices)))
    return {status: statuses.count(status) for status in set(statuses)}


@pytest.mark.engine
@pytest.mark.verify
@pytest.mark.timeout(3600)
def test_memory_levels_off(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    log = tmp_path / "server.log"
    limit = FEATURE_CACHE_GB * 2**30
    held: list[list[float]] = []
    grown: dict[str, float] = {}
    level = False
    with (
        running_server(OPTIONS, environment=ENVIRONMENT, log=log) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        assert send(client, range(FULL_BY)).keys() == {200, 400}
        processes = server_processes(url)
        assert len(processes) >= 2, "the API process and the engine"
        roles = [role_of(process) for process in processes]
        for first in range(FULL_BY, REQUESTS, BATCH):
            assert 0.8 * limit < Server(url, log).metrics()["vtprune:feature_cache_bytes"] <= limit
            held.append(resident(processes))
            if len(held) > WINDOW // BATCH:
                ratios = [after / before for before, after in zip(held.pop(0), held[-1], strict=True)]
                grown = {role: round(ratio - 1, 4) for role, ratio in zip(roles, ratios, strict=True)}
                level = max(ratios) <= 1 + TOLERANCE
                if level:
                    break
            assert send(client, range(first, first + BATCH)).keys() == {200, 400}
    record_property("requests", first)
    record_property("grown", grown)
    assert level, grown

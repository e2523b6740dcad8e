"""Concurrent requests on a real server: their images are encoded together, once each, and only where they prune."""

import http.client
import json
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.chat import Body, Server, by_energy, fresh_url, image_part, kept, user

pytestmark = pytest.mark.engine

THINGS = ["dog", "bus", "tree", "cat", "boat", "hat", "cup", "lamp"]
RUNS, IMAGES = "vtprune:encode_batch_size_count", "vtprune:encode_batch_size_sum"


def at_once(asks: Iterable[Callable[[], Body]]) -> list[Body]:
    asks = list(asks)
    with ThreadPoolExecutor(len(asks)) as threads:
        return [future.result() for future in [threads.submit(ask) for ask in asks]]


def asker(server: Server, noun: str, parts: list[Body], **fields: Any) -> Callable[[], Body]:
    return lambda: server.ask(messages=[user(f"Where is the {noun}?", *parts)], **fields)


def test_images_of_requests_at_the_same_time_are_encoded_together(server: Server) -> None:
    """And belong to who sent them: each answer is that of the request alone, with its images encoded alone."""
    policy = {"budget": {"type": "energy", "threshold": 0.95, "min_tokens": 1}}
    urls = {noun: [fresh_url() for _ in range(3)] for noun in THINGS}
    before = server.metrics()
    together = at_once(
        asker(server, noun, [image_part(url) for url in urls[noun]], pruning=policy, max_tokens=8) for noun in THINGS
    )
    runs, images = server.metrics().since(before, RUNS, IMAGES)
    assert images == 3 * len(THINGS)
    assert runs < images, "one by one"
    assert server.metrics().since(before, "vtprune:feature_cache_misses_total") == (images,)

    for noun, answer in zip(THINGS, together, strict=True):
        parts = [image_part(url, uuid=f"alone {noun} {i}") for i, url in enumerate(urls[noun])]
        alone = asker(server, noun, parts, pruning=policy, max_tokens=8)()
        assert answer["choices"][0]["message"] == alone["choices"][0]["message"]
        assert [image["nouns"] for image in answer["pruning"]["images"]] == [[noun]] * 3
        assert kept(answer) == kept(alone)
        energies = [[image["energy"] for image in response["pruning"]["images"]] for response in (answer, alone)]
        assert energies[0] == pytest.approx(energies[1], abs=1e-3)
    assert server.metrics().since(before, IMAGES) == (6 * len(THINGS),), "not encoded again"


def test_one_image_in_many_requests_is_encoded_once(server: Server) -> None:
    url = fresh_url()
    before = server.metrics()
    policies = [by_energy(20 + i) for i in range(8)]
    answers = at_once(
        asker(server, noun, [image_part(url), image_part(url)], pruning=policy)
        for noun, policy in zip(THINGS, policies, strict=True)
    )
    assert [kept(answer) for answer in answers] == [[20 + i] * 2 for i in range(8)]
    assert server.metrics().since(before, RUNS, IMAGES) == (1, 1)


def test_one_image_written_in_several_ways_is_encoded_once(server: Server) -> None:
    url = fresh_url()
    ways = {
        "plain": image_part(url),
        "no object": {"type": "image_url", "image_url": url},
        "lines": image_part(re.sub(r"(.{76})", r"\1\r\n", url)),
        "no padding": image_part(url.rstrip("=")),
        "surplus padding": image_part(f"{url}="),
        "for URLs": image_part(url[:22] + url[22:].replace("+", "-").replace("/", "_")),
        "escaped": image_part(url[:22] + url[22:].replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")),
        "space": image_part(f" {url}\n"),
    }
    before = server.metrics()
    answers = at_once(
        asker(server, noun, [part], pruning=by_energy(30 + i))
        for i, (noun, part) in enumerate(zip(THINGS, ways.values(), strict=True))
    )
    assert [kept(answer) for answer in answers] == [[30 + i] for i in range(len(ways))]
    assert server.metrics().since(before, RUNS, IMAGES) == (1, 1)


def test_images_that_are_not_pruned_are_not_encoded(server: Server) -> None:
    before = server.metrics()
    at_once(asker(server, noun, [image_part(fresh_url())], pruning=False) for noun in THINGS)
    assert server.metrics().since(before, IMAGES) == (0,)
    mixed = [image_part(fresh_url(), pruning=False), image_part(fresh_url(), pruning=by_energy(64))]
    assert kept(asker(server, "dog", mixed)()) == [576, 64]
    assert server.metrics().since(before, IMAGES) == (1,)


def test_a_request_that_is_refused_leaves_no_work(server: Server) -> None:
    before = server.metrics()
    broken = image_part("data:image/png;base64,@@@@")
    answers = [
        server.post({"messages": [user("Where?", image_part(fresh_url()), broken)], "pruning": by_energy(64)})
        for _ in range(4)
    ]
    assert [answer.status_code for answer in answers] == [400] * 4
    (images,) = settled(server).since(before, IMAGES)
    assert images <= 4


def test_the_work_of_clients_that_leave_is_dropped(server: Server) -> None:
    requests, images_each = 24, 3
    before = server.metrics()
    address = urlsplit(server.url)
    bodies = [
        json.dumps({**server.defaults, "messages": [user("Where?", *[fresh_url() for _ in range(images_each)])]})
        for _ in range(requests)
    ]
    for body in bodies:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        connection.close()
    (images,) = settled(server).since(before, IMAGES)
    assert images < requests * images_each / 2
    assert kept(server.ask(messages=[user("Where is the dog?", fresh_url())], pruning="fast")) == [64]


def settled(server: Server) -> Any:
    """The metrics, once no image is on its way."""
    deadline = time.monotonic() + 60
    earlier = server.metrics()
    while True:
        time.sleep(1)
        now = server.metrics()
        if now.since(earlier, IMAGES) == (0,):
            return now
        assert time.monotonic() < deadline
        earlier = now

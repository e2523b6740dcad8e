"""No image is taken for sent that was not: refused and abandoned requests leave nothing behind."""

import asyncio
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache
from vllm.multimodal.cache.shm import ShmObjectStoreSenderCache
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

from tests.support.chat import Body, Server, data_of, fresh_url, user
from vllm_vtprune_server.sender_cache import ResendingSenderCache, resend_unsent_images

SIZE = 1000  # bytes of an item
HASHES = "abc"


class Feature(SimpleNamespace):
    """An image of a request, as vLLM sends it: without data if the engine is thought to have it."""

    data: MultiModalKwargsItem | None
    mm_hash: str


class Pair:
    """The caches of an API process and of its engine, and what goes from one to the other."""

    def __init__(self, items: int = 100) -> None:
        config = SimpleNamespace(mm_processor_cache_gb=items * SIZE / 1024**3)
        model_config: Any = SimpleNamespace(get_multimodal_config=lambda: config)
        self.sender: Any = LruKeyReplicatedSenderCache(model_config)
        self.receiver = LruKeyReplicatedReceiverCache(model_config)

        async def add_request_async(request: Any) -> None:
            self.receiver.get_and_update_features(request.mm_features)

        core = SimpleNamespace(add_request_async=add_request_async)
        self.client: Any = SimpleNamespace(renderer=SimpleNamespace(mm_processor_cache=self.sender), engine_core=core)
        resend_unsent_images(self.client)

    def render(self, *hashes: str) -> list[Feature]:
        """What vLLM's processor does with the cache (multimodal/processing/processor.py)."""
        known = self.sender.is_cached(list(hashes))
        for mm_hash in hashes:
            self.sender.touch_sender_cache_item(mm_hash)
        items = [None if cached else (item(), [mm_hash]) for mm_hash, cached in zip(hashes, known, strict=True)]
        merged = self.sender.get_and_update(items, list(hashes))
        assert [updates for _, updates in merged] == [[mm_hash] for mm_hash in hashes]
        return [Feature(data=data, mm_hash=mm_hash) for (data, _), mm_hash in zip(merged, hashes, strict=True)]

    def send(self, features: list[Feature]) -> None:
        """Fails where the engine lacks an item that comes without data."""
        asyncio.run(self.client.engine_core.add_request_async(SimpleNamespace(mm_features=features)))


def item() -> MultiModalKwargsItem:
    data = torch.zeros(SIZE, dtype=torch.uint8)
    return MultiModalKwargsItem({"pixels": MultiModalFieldElem(data=data, field=MultiModalBatchedField())})


def test_what_was_sent_is_not_sent_again() -> None:
    pair = Pair()
    assert isinstance(pair.sender, ResendingSenderCache)
    first = pair.render("a", "b")
    assert all(feature.data is not None for feature in first)
    pair.send(first)
    again = pair.render("b", "a", "c")
    assert [feature.data is None for feature in again] == [True, True, False]
    pair.send(again)
    pair.send([])


def test_what_was_given_up_is_sent_by_the_next() -> None:
    pair = Pair()
    pair.render("a", "b")
    pair.send(pair.render("a"))
    later = pair.render("a", "b")
    assert [feature.data is None for feature in later] == [True, False]
    pair.send(later)


def test_who_comes_meanwhile_may_be_faster() -> None:
    pair = Pair()
    slow, fast = pair.render("a"), pair.render("a")
    pair.send(fast)
    known = pair.render("a")
    assert known[0].data is None
    pair.send(known)
    pair.send(slow)


@given(
    st.integers(4, 9),
    st.lists(st.tuples(st.sampled_from(["render", "send", "give up"]), st.text(HASHES, min_size=1, max_size=3))),
    st.randoms(use_true_random=False),
)
def test_in_whatever_order_nothing_is_missing(items: int, steps: list[tuple[str, str]], choice: random.Random) -> None:
    pair = Pair(items)
    waiting: list[list[Feature]] = []
    for step, hashes in [*steps, *[("render", letter) for letter in HASHES], *[("send", "")] * 2]:
        if step == "render":
            waiting.append(pair.render(*hashes))
        elif waiting:
            features = waiting.pop(choice.randrange(len(waiting)))
            if step == "send":
                pair.send(features)
    assert pair.sender.unsent <= {*HASHES}


def test_what_the_cache_forgot_is_not_remembered_as_unsent() -> None:
    pair = Pair(items=3)
    for number in range(100):
        pair.render(str(number))
    assert len(pair.sender.unsent) <= 7


def test_a_cleared_cache_knows_nothing() -> None:
    pair = Pair()
    pair.render("a")
    pair.sender.clear_cache()
    assert pair.sender.unsent == set()
    pair.send(pair.render("a"))


@pytest.mark.parametrize("cache", [None, object.__new__(ShmObjectStoreSenderCache)])
def test_a_cache_of_another_kind_is_left_alone(cache: Any) -> None:
    core = SimpleNamespace()
    client: Any = SimpleNamespace(renderer=SimpleNamespace(mm_processor_cache=cache), engine_core=core)
    resend_unsent_images(client)
    assert type(cache) in (type(None), ShmObjectStoreSenderCache)
    assert vars(core) == {}


# --- the server -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, Body] = {
    "too long": {"max_tokens": None, "messages_after": "word " * 3000},
    "top_logprobs": {"logprobs": True, "top_logprobs": 1000},
    "logit_bias": {"logit_bias": {"99999999": 1.0}},
    "a regex": {"structured_outputs": {"regex": "("}},
    "n": {"n": 100_000},
    "stop": {"stop": [""]},
    "min_tokens": {"min_tokens": 100, "max_tokens": 4},
}
PRUNINGS: list[Any] = [{"budget": {"type": "tokens", "keep": 40}}, False]


@pytest.mark.engine
@pytest.mark.parametrize("pruning", PRUNINGS, ids=["pruned", "unpruned"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_images_of_a_refused_request_are_answered_next_time(server: Server, stream: bool, pruning: Any) -> None:
    for name, fields in REFUSED.items():
        url = fresh_url()
        text = fields.get("messages_after", "Where?")
        body = {key: value for key, value in fields.items() if key != "messages_after"}
        refused = server.post({"messages": [user(text, url)], "pruning": pruning, "stream": stream, **body})
        events = (
            [json.loads(event) for event in data_of(refused.text)[:-1]]
            if refused.status_code == 200
            else [refused.json()]
        )
        assert events[0]["error"]["code"] == 400, f"{name}: {refused.text[:300]}"
        answer = server.post({"messages": [user("Where?", url)], "pruning": pruning})
        assert answer.status_code == 200, f"{name}: {answer.text[:300]}"


@pytest.mark.engine
def test_clients_that_leave_harm_nobody(server: Server) -> None:
    """Fifty that leave at random moments, and as many that ask for the same images."""
    rng = random.Random(0)
    urls = [fresh_url() for _ in range(12)]
    moments = [rng.uniform(0, 0.2) for _ in range(50)]
    address = urlsplit(server.url)
    aborted = "vtprune:requests_total|outcome=aborted"
    before = server.metrics()

    def asked(index: int, pruning: Any) -> Body:
        return {**server.defaults, "messages": [user("Where?", urls[index % 12])], "pruning": pruning}

    def leave(index: int) -> None:
        body = {**asked(index, PRUNINGS[index % 2]), "stream": index % 3 == 0}
        client = HTTPConnection(str(address.hostname), address.port)
        client.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        time.sleep(moments[index])
        client.close()

    def stay(index: int) -> str:
        answer = server.post(asked(index, PRUNINGS[(index // 12) % 2]))
        return "answered" if answer.status_code == 200 else answer.text

    with ThreadPoolExecutor(100) as threads:
        leaving = [threads.submit(leave, index) for index in range(50)]
        staying = [threads.submit(stay, index) for index in range(50)]
        assert {future.result() for future in staying} == {"answered"}
        for future in leaving:
            future.result()
    assert {stay(index) for index in range(24)} == {"answered"}, "and afterwards"
    assert server.metrics().since(before, aborted)[0] > 10, "too few left for the test to see anything"

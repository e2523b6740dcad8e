"""Many requests at the same time: each gets its own report and its own answer."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.chat import Body, Server, fresh_url, image_part, text_of, user

pytestmark = pytest.mark.engine

REQUESTS = 200 if os.environ.get("VTPRUNE_VERIFY") else 64
PICTURES = 24
THINGS = ["dog", "bus", "tree", "cat", "boat", "hat", "cup", "lamp", "kite", "sign"]
POLICIES: list[Any] = [
    None,
    False,
    "fast",
    "thumbnail",
    "balanced",
    {"budget": {"type": "tokens", "keep": 40}},
    {"method": "uniform", "budget": {"type": "ratio", "keep": 0.2}},
    {"method": "random", "seed": 3, "budget": {"type": "tokens", "keep": 30}},
    {"method": "divprune", "budget": {"type": "tokens", "keep": 50}},
    {"text": {"query": "a red kite"}, "budget": {"type": "tokens", "keep": 20}},
]


def mixed_requests() -> list[Body]:
    """The same in every run, but for the pictures: one to three of them, some shared between requests."""
    rng = random.Random(0)
    pictures = [fresh_url() for _ in range(PICTURES)]
    requests = []
    for index in range(REQUESTS):
        images = [
            image_part(url, **({"pruning": rng.choice(POLICIES)} if rng.random() < 0.3 else {}))
            for url in rng.sample(pictures, rng.choice([1, 1, 1, 2, 3]))
        ]
        body: Body = {"messages": [user(f"Where is the {rng.choice(THINGS)} number {index}?", *images)]}
        if rng.random() < 0.8:
            body["pruning"] = rng.choice(POLICIES)
        if rng.random() < 0.2:
            body["model"] = f"llava@{rng.choice(['fast', 'thumbnail', 'off'])}"
        requests.append({**body, "max_tokens": 5, "stream_options": {"include_usage": True}})
    return requests


def outcome(chunks: list[Body]) -> Body:
    """What must not depend on other requests: the answer, and the report but for what a cache or the clock changes."""
    report = chunks[-1]["pruning"]
    images = [{key: value for key, value in image.items() if key != "cached"} for image in report["images"]]
    return {
        "text": text_of(chunks),
        "prompt_tokens": chunks[-1]["usage"]["prompt_tokens"],
        "tokens": chunks[-1]["usage"]["prompt_tokens_details"]["vtprune"],
        "report": {**{key: report[key] for key in ("method", "preset", "budget")}, "images": images},
    }


def test_streams_at_the_same_time_do_not_mix(server: Server, record_property: Any) -> None:
    """Every answer and report is that of the same request asked alone, afterwards."""
    requests = mixed_requests()
    with ThreadPoolExecutor(REQUESTS) as threads:
        together = [outcome(chunks) for chunks in threads.map(lambda body: server.stream(**body), requests)]
    alone = [outcome(server.stream(**body)) for body in requests]
    wrong = [index for index, (result, other) in enumerate(zip(together, alone, strict=True)) if result != other]
    assert wrong == [], f"first: {requests[wrong[0]]}\n{together[wrong[0]]}\n{alone[wrong[0]]}"
    assert len({str(result["report"]) for result in together}) > REQUESTS / 4, "a mixture, or the test sees nothing"
    assert len({result["text"] for result in together}) > REQUESTS / 4
    record_property("requests", REQUESTS)

"""Weights that are replaced while the server runs, and its endpoints that empty caches."""

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat import VISUAL_TOKENS, Body, Server, by_energy, fresh_url, image_part, user
from tests.support.engines import TOLERANCE
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint

pytestmark = pytest.mark.engine

EVERY_TOKEN = {"budget": {"type": "tokens", "keep": VISUAL_TOKENS}}


def logprobs_of(server: Server, url: str, pruning: Any) -> list[dict[str, float]]:
    messages = [user("Where is the dog?", url)]
    answer = server.ask(messages=messages, pruning=pruning, logprobs=True, top_logprobs=5, max_tokens=8)
    steps = answer["choices"][0]["logprobs"]["content"]
    return [{entry["token"]: entry["logprob"] for entry in step["top_logprobs"]} for step in steps]


def difference(first: list[dict[str, float]], second: list[dict[str, float]]) -> float:
    """The largest, of the first token: the later ones may follow from others. Infinite where no token is in both."""
    return max((abs(first[0][token] - second[0][token]) for token in first[0].keys() & second[0]), default=math.inf)


def reload(server: Server, checkpoint: Path) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoint)}}
    assert server.post(body, "/collective_rpc").status_code == 200
    for cache in ("prefix", "mm", "encoder"):  # as vLLM wants it, for images that are not pruned
        assert server.post({}, f"/reset_{cache}_cache").status_code == 200


def test_pruned_images_follow_the_engine_s_weights(server: Server, tmp_path: Path) -> None:
    """The engine's own encoder is the reference: with every token kept, both give the same answer."""
    other = write_llava_checkpoint(tmp_path / "other", seed=1)
    seen = fresh_url()
    before = logprobs_of(server, seen, EVERY_TOKEN)
    assert difference(before, logprobs_of(server, seen, False)) < TOLERANCE
    reload(server, other)
    try:
        for url in (seen, fresh_url()):
            assert difference(logprobs_of(server, url, EVERY_TOKEN), logprobs_of(server, url, False)) < TOLERANCE
        assert difference(logprobs_of(server, seen, EVERY_TOKEN), before) > 10 * TOLERANCE
    finally:
        reload(server, tiny_checkpoint())
    assert difference(logprobs_of(server, seen, EVERY_TOKEN), before) < TOLERANCE


def test_emptying_vllm_s_caches_of_images_empties_ours(server: Server) -> None:
    def ask() -> None:
        server.ask(messages=[user("Where is the dog?", url)], pruning=by_energy(next(counts)))

    url, counts = fresh_url(), count(30)
    encoded = "vtprune:feature_cache_misses_total"
    for path in ("/reset_mm_cache", "/reset_encoder_cache"):
        ask()
        assert server.metrics()["vtprune:feature_cache_bytes"] > 0
        assert server.post({}, path).status_code == 200
        before = server.metrics()
        assert before["vtprune:feature_cache_bytes"] == 0
        ask()
        assert server.metrics().since(before, encoded) == (1,)


def test_a_uuid_may_be_a_number(server: Server) -> None:
    """vLLM writes it as text."""
    named: Body = image_part(fresh_url(), uuid=4711)
    shown = server.ask(messages=[user("Where is the dog?", named)], pruning=EVERY_TOKEN)
    for uuid in (4711, "4711"):
        again = server.ask(messages=[user("Where is the dog?", image_part(None, uuid=uuid))], pruning=EVERY_TOKEN)
        assert again["choices"][0]["message"] == shown["choices"][0]["message"]
        assert again["pruning"]["images"][0]["cached"]

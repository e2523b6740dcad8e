"""Model Runner V2, vLLM's default on GPUs, answers as V1 does: whole engines, whose kernels Triton interprets.

Prefill goes in chunks smaller than an image, and every cache is on. `make verify` runs this folder's other tests on V2.
"""

from pathlib import Path

import pytest

from tests.engine.test_families import LANDSCAPE, PORTRAIT, QUESTION, Checker
from tests.support.engines import BLOCK, Ask, Engine, ask_about, assert_same
from tests.support.families import FAMILIES, Chat, Turn
from tests.support.images import sample_images
from tests.support.unpruned import UnprunedReference

pytestmark = [
    pytest.mark.engine,
    pytest.mark.parametrize("model_runner", ["V2"], indirect=True, scope="session"),
]

TOKENS = {"budget": {"type": "tokens", "keep": 24}}
ENERGY = {"budget": {"type": "energy", "threshold": 0.95, "min_tokens": 1}}
CHUNK = 64  # tokens of a step, of both engines
BUS = "Where is the bus?"


def test_llava_answers_as_on_v1(chunked: Engine, uncached: Engine) -> None:
    assert chunked.model_runner == "V2"
    image_a, image_b = sample_images(2, stamp="V2")
    requests = [
        Ask(ask_about(BUS), [image_a], {"budget": {"type": "tokens", "keep": 200}}, max_tokens=4),
        Ask(ask_about(BUS), [image_a], ENERGY, max_tokens=4),
        Ask(ask_about(BUS, images=0), max_tokens=4),
        Ask(ask_about(BUS, images=2), [image_a, image_b], {"images": [False, TOKENS]}, max_tokens=4),
    ]
    expected = [uncached.ask(request) for request in requests]
    assert sum(len(answer.prompt_ids) > 2 * CHUNK for answer in expected) >= 2
    for request, answer in zip(requests, expected, strict=True):
        first, again = chunked.ask(request), chunked.ask(request)
        assert_same(first, answer)
        assert_same(again, answer)
        assert again.prefix_hits == (len(answer.prompt_ids) - 1) // BLOCK * BLOCK
    chunked.forget_prompts()
    for got, answer in zip(chunked.ask_together(requests), expected, strict=True):
        assert (got.prompt_ids, got.token_ids) == (answer.prompt_ids, answer.token_ids)


def test_qwen2_5_vl_answers_as_transformers(qwen: Engine, qwen_checkpoint: Path) -> None:
    assert qwen.model_runner == "V2"
    checker = Checker(FAMILIES["qwen2_5_vl"], qwen, UnprunedReference(qwen_checkpoint), Chat(qwen_checkpoint))
    for policies in ({LANDSCAPE: ENERGY}, {PORTRAIT: False, LANDSCAPE: TOKENS}):
        shown = [checker.shown(index, policy) for index, policy in policies.items()]
        turns = [Turn(QUESTION, len(shown))]
        first, again = checker.ask(turns, shown), checker.ask(turns, shown)
        assert all(report.visual_tokens > CHUNK for report in first.images or ())
        assert again.prefix_hits == (len(first.prompt_ids) - 1) // BLOCK * BLOCK

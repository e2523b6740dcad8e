"""Model Runner V2, vLLM's default on GPUs, answers as V1 does: whole engines, whose kernels Triton interprets.

Prefill goes in chunks smaller than an image, and every cache is on. `make verify` runs this folder's other tests on V2.
"""

from pathlib import Path

import pytest
from PIL import ImageOps

from tests.support.engines import BLOCK, Ask, Engine, ask_about, assert_same
from tests.support.images import sample_images
from tests.support.qwen2_5_vl import IMAGE, QwenReference
from tests.support.qwen2_5_vl import ask_about as ask_qwen_about
from tests.support.qwen2_5_vl_answers import Picture, compare, pruned, reports

pytestmark = [
    pytest.mark.engine,
    pytest.mark.parametrize("model_runner", ["V2"], indirect=True, scope="session"),
]

TOKENS = {"budget": {"type": "tokens", "keep": 24}}
ENERGY = {"budget": {"type": "energy", "threshold": 0.95, "min_tokens": 1}}
CHUNK = 64  # tokens of a step, of both engines
BUS = "Where is the bus?"
PORTRAIT_LANDSCAPE = ((224, 448), (448, 252))


def test_llava_answers_as_on_v1(chunked: Engine, uncached: Engine) -> None:
    assert runner_of(chunked) == "vllm.v1.worker.cpu.model_runner"
    one, two = sample_images(2, stamp="V2")
    requests = [
        Ask(ask_about(BUS), [one], {"budget": {"type": "tokens", "keep": 200}}),
        Ask(ask_about(BUS), [one], ENERGY),
        Ask(ask_about(BUS), [one]),
        Ask(ask_about(BUS, images=0)),
        Ask(ask_about(BUS, images=2), [one, two], {"images": [False, TOKENS]}),
        Ask(ask_about(BUS, images=2), [two, one], {"images": [TOKENS, ENERGY]}),
    ]
    expected = [uncached.ask(request) for request in requests]
    assert sum(len(answer.prompt_ids) > 2 * CHUNK for answer in expected) >= 3
    for request, answer in zip(requests, expected, strict=True):
        first, again = chunked.ask(request), chunked.ask(request)
        assert_same(first, answer)
        assert_same(again, answer)
        assert again.prefix_hits == (len(answer.prompt_ids) - 1) // BLOCK * BLOCK
    chunked.forget_prompts()
    for got, answer in zip(chunked.ask_together(requests), expected, strict=True):
        assert (got.prompt_ids, got.token_ids) == (answer.prompt_ids, answer.token_ids)


def test_qwen2_5_vl_answers_as_transformers(qwen: Engine, qwen_checkpoint: Path) -> None:
    """As V1 does in `test_qwen.py`: the positions are worked out by hand."""
    assert runner_of(qwen) == "vllm.v1.worker.cpu.model_runner"
    reference = QwenReference(qwen_checkpoint)
    images = [ImageOps.fit(image, size) for image, size in zip(sample_images(2, "V2"), PORTRAIT_LANDSCAPE, strict=True)]
    tall, wide = (Picture(image, f"V2-{image.size}", reference.image(image)) for image in images)
    assert min(len(picture.whole.embeds) for picture in (tall, wide)) > CHUNK
    for shown in (
        [(tall, TOKENS)],
        [(tall, {"budget": {"type": "ratio", "keep": 0.9}})],
        [(wide, ENERGY)],
        [(wide, False)],
        [(tall, False), (wide, TOKENS)],
        [(wide, ENERGY), (tall, {"budget": {"type": "ratio", "keep": 0.5}})],
    ):
        request = Ask(
            ask_qwen_about(BUS, IMAGE * len(shown)),
            [picture.image for picture, _ in shown],
            {"images": [policy for _, policy in shown], "texts": [BUS] * len(shown)},
            [picture.uuid for picture, _ in shown],
        )
        first, again = qwen.ask(request), qwen.ask(request)
        media = [
            pruned(qwen, reference, picture, policy, ["bus"]) if policy else picture.whole for picture, policy in shown
        ]
        for answer in (first, again):
            compare(reference, answer, request.prompt, media)
            assert [report.kept_tokens for report in reports(answer)] == [len(medium.kept) for medium in media]
        assert again.prefix_hits == (len(first.prompt_ids) - 1) // BLOCK * BLOCK


def runner_of(engine: Engine) -> str:
    """The module of the model runner."""
    [worker] = engine.llm.collective_rpc("worker_state")
    return worker["model_runner"]

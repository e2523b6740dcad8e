"""Qwen3.5 with vLLM's own kernels, which compute linear attention on CPUs in bfloat16 alone.

`test_families.py` has it in float32, with a stand-in for one kernel. Here rounding moves log-probabilities by tenths.

With Model Runner V1 alone: on V2, stock vLLM 0.32.0 itself, without the plugin, computes NaN with these kernels for a
prompt with an image that is prefilled in chunks. With the stand-in, V2 gives what transformers gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.engines import BLOCK, MODEL_RUNNERS, Ask, Engine, running_engine, worst
from tests.support.families import FAMILIES, Chat, Turn
from tests.support.unpruned import UnprunedReference
from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune_checkpoints.qwen3_5 import write_qwen3_5_checkpoint

pytestmark = [
    pytest.mark.engine,
    pytest.mark.parametrize("model_runner", ["V1"], indirect=True, scope="session"),
]

ROUNDING = 0.3
"""Of a log-probability, from those in float32."""

POLICY = {"method": "divprune", "budget": {"type": "ratio", "keep": 0.5}}
FAMILY = FAMILIES["qwen3_5"]
PICTURES = FAMILY.pictures()
NAMES = [f"picture-{index}" for index in range(len(PICTURES))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_5_checkpoint(tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path, model_runner: str) -> Iterator[Engine]:
    options = {**FAMILY.engine_options, "dtype": "bfloat16"}
    with running_engine(checkpoint, "bfloat16", environment=MODEL_RUNNERS[model_runner], **options) as engine:
        yield engine


def test_pruned_answers_are_near_to_those_in_float32(
    engine: Engine, checkpoint: Path, record_property: Callable[[str, object], None]
) -> None:
    """New, from the caches, and in a batch with others: in two turns."""
    reference, chat = UnprunedReference(checkpoint), Chat(checkpoint)
    turns = [Turn("What is it?", 2), Turn("And this?", 1)]
    requests = [
        Ask(chat.prompt(turns[:count]), PICTURES[:images], POLICY, NAMES[:images]) for count, images in ((1, 2), (2, 3))
    ]
    answers = [
        *map(engine.ask, requests),
        *map(engine.ask, requests),
        *engine.ask_together([*requests, replace(requests[0], pruning=False)])[:2],
    ]
    assert all(answer.prefix_hits >= (len(answer.prompt_ids) - 1) // BLOCK * BLOCK > 0 for answer in answers[2:])
    features = [engine.runtime.local.cache.get(name) for name in NAMES]
    kept = [
        plan_tokens(image_features, PruningPolicy.parse(POLICY)).kept
        for image_features in features
        if image_features is not None
    ]
    assert len(kept) == len(PICTURES)
    differences = []
    for answer, request in zip(answers, requests * 3, strict=True):
        prompt_ids, logprobs, _ = reference.read(
            request.prompt, request.images, kept[: len(request.images)], answer.token_ids
        )
        assert answer.prompt_ids == prompt_ids
        behind = logprobs.max(dim=1).values - logprobs[range(len(logprobs)), answer.token_ids]
        differences += [worst(answer, logprobs), float(behind.max()) / 2]
    record_property("worst_logprob_difference", max(differences))
    assert max(differences) < ROUNDING
    others = [torch.tensor(sorted(set(range(int(tokens[-1]) + 1)) - set(tokens.tolist()))) for tokens in kept]
    logprobs = reference.logprobs(requests[1].prompt, PICTURES, others, answers[1].token_ids)
    assert worst(answers[1], logprobs) > 2 * ROUNDING, "the tokens that were dropped would be seen"


def test_keeping_every_token_is_the_unpruned_answer(
    engine: Engine, checkpoint: Path, record_property: Callable[[str, object], None]
) -> None:
    every = {"method": "divprune", "budget": {"type": "ratio", "keep": 1.0}}
    request = Ask(Chat(checkpoint).prompt([Turn("Compare them.", 3)]), PICTURES, every, NAMES)
    engine.forget_prompts()
    kept = engine.ask(request)
    engine.forget_prompts()
    whole = engine.ask(replace(request, pruning=None))
    assert (kept.prompt_ids, kept.token_ids) == (whole.prompt_ids, whole.token_ids)
    steps = zip(kept.logprobs, whole.logprobs, strict=True)
    differences = [abs(step[token] - other[token]) for step, other in steps for token in step.keys() & other]
    record_property("worst_difference_of_every_token", max(differences))
    assert max(differences) < 1e-2

"""Qwen2.5-VL and Qwen3-VL: what vLLM answered, against transformers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from tests.support.engines import TOLERANCE, Answer, Engine, worst
from tests.support.qwen2_5_vl import Medium, QwenReference
from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune.report import ImageReport

TIE = 1e-4
"""Tokens whose log-probabilities in the reference are closer than this may change places; the record counts them."""


class Picture(NamedTuple):
    image: Image.Image
    uuid: str  # also the key of its features in the runtime's cache
    whole: Medium


def pruned(engine: Engine, reference: QwenReference, picture: Picture, policy: Any, nouns: Sequence[str]) -> Medium:
    """The picture with the tokens that `plan_tokens` keeps of the features in the engine's cache."""
    features = engine.runtime.encoder.cache.get(picture.uuid)
    assert features is not None
    assert features.grid == picture.whole.grid[1:]
    torch.testing.assert_close(features.embeds, picture.whole.embeds, rtol=0, atol=1e-4)
    torch.testing.assert_close(features.deepstack, picture.whole.deepstack, rtol=0, atol=1e-4)
    plan = plan_tokens(features, PruningPolicy.parse(policy), reference.noun_embeds(nouns), family=reference.family)
    return picture.whole._replace(kept=plan.kept)


class Comparison(NamedTuple):
    worst: float
    ties: int


def compare(reference: QwenReference, answer: Answer, prompt: str, media: Sequence[Medium]) -> Comparison:
    """vLLM's answer against the reference's: every token of it the likeliest next one, log-probabilities equal."""
    assert answer.prompt_ids == reference.prompt_ids_of(prompt, media)
    logprobs = reference.answer_logprobs(prompt, media, answer.token_ids)
    behind = logprobs.max(dim=1).values - logprobs[range(len(logprobs)), answer.token_ids]
    assert behind.max() < TIE, f"{answer.token_ids} is not {logprobs.argmax(dim=1).tolist()}"
    difference = worst(answer, logprobs)
    assert difference < TOLERANCE
    return Comparison(difference, int((behind > 0).sum()))


def reports(answer: Answer) -> list[ImageReport]:
    assert answer.images is not None
    return answer.images

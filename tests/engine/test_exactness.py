"""What vLLM says about a pruned image is what transformers says about the same kept tokens.

vLLM decodes greedily. The reference, built from the checkpoint alone, reads the same prompt with its own embeddings of
the tokens that `plan_tokens` keeps. Every token of vLLM's answer must be the reference's likeliest next one, by which
the two answers are equal, and the log-probabilities must agree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from tests.support.engines import TOLERANCE, Answer, Ask, Engine, ask_about, worst
from tests.support.images import sample_images
from tests.support.reference import Reference
from vllm_vtprune import PruningPlan, PruningPolicy, VisualFeatures, plan_tokens

pytestmark = pytest.mark.engine

IMAGES = 20
QUESTIONS = {
    "What does the astronaut wear?": ("astronaut",),
    "Where is the cat, and where is the cup?": ("cat", "cup"),
    "Is there a bus at the harbour?": ("bus", "harbour"),
    "What is it?": (),  # nothing to condition on
}
POLICIES: dict[str, dict[str, Any]] = {
    "tokens-16": {"budget": {"type": "tokens", "keep": 16}},
    "tokens-64": {"budget": {"type": "tokens", "keep": 64}},
    "tokens-128": {"budget": {"type": "tokens", "keep": 128}},
    "ratio-third": {"budget": {"type": "ratio", "keep": 1 / 3}},
    "energy-0.9": {"budget": {"type": "energy", "threshold": 0.9, "min_tokens": 1}},
    "energy-0.99": {"budget": {"type": "energy", "threshold": 0.99, "min_tokens": 1}},
    "random": {"method": "random", "budget": {"type": "tokens", "keep": 64}},
    "uniform": {"method": "uniform", "budget": {"type": "tokens", "keep": 64}},
}
TIE = 1e-4
"""Tokens whose log-probabilities in the reference are closer than this may change places; the record counts them."""


class Case(NamedTuple):
    """One image of the set, with its question and the reference's embeddings (N, d) of all its tokens."""

    image: Image.Image
    uuid: str  # also the key of its features in the runtime's cache
    question: str
    nouns: tuple[str, ...]
    embeds: torch.Tensor


@pytest.fixture(scope="module")
def reference(checkpoint: Any) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def cases(reference: Reference) -> list[Case]:
    questions = list(QUESTIONS.items())
    return [
        Case(image, f"exactness-{i}", *questions[i % len(questions)], reference.visual_embeds(image))
        for i, image in enumerate(sample_images(IMAGES))
    ]


@pytest.fixture(scope="module")
def features(cached: Engine) -> Callable[[Case], VisualFeatures]:
    """What the frontend's tower computed of a case's image."""

    def find(case: Case) -> VisualFeatures:
        if cached.runtime.encoder.cache.get(case.uuid) is None:
            ask(cached, case, POLICIES["uniform"])
        found = cached.runtime.encoder.cache.get(case.uuid)
        assert found is not None
        return found

    return find


def ask(engine: Engine, case: Case, policy: dict[str, Any]) -> Answer:
    return engine.ask(Ask(ask_about(case.question), [case.image], {**policy, "texts": [case.question]}, [case.uuid]))


def plan(reference: Reference, case: Case, features: VisualFeatures, policy: dict[str, Any]) -> PruningPlan:
    return plan_tokens(features, PruningPolicy.parse(policy), reference.noun_embeds(case.nouns))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_greedy_answers_are_those_of_transformers(
    cached: Engine,
    reference: Reference,
    cases: list[Case],
    features: Callable[[Case], VisualFeatures],
    policy: dict[str, Any],
    record_property: Callable[[str, object], None],
) -> None:
    differences, ties, counts = [], 0, set()
    for case in cases:
        answer = ask(cached, case, policy)
        kept = plan(reference, case, features(case), policy).kept
        prompt_ids = reference.prompt_ids(ask_about(case.question), [len(kept)])
        assert answer.prompt_ids == prompt_ids
        assert answer.images is not None
        (report,) = answer.images
        assert report.kept_tokens == len(kept) == answer.prompt_ids.count(reference.image_token)
        assert report.visual_tokens == len(case.embeds) == 576
        assert report.nouns == (case.nouns if policy.get("method", "resprune") == "resprune" else ())

        logprobs = reference.logprobs(prompt_ids, [case.embeds[kept]], answer.token_ids)
        differences.append(worst(answer, logprobs))
        behind = logprobs.max(dim=1).values - logprobs[range(len(logprobs)), answer.token_ids]
        assert behind.max() < TIE, f"{case.uuid}: {answer.token_ids} is not {logprobs.argmax(dim=1).tolist()}"
        ties += int((behind > 0).sum())
        counts.add(len(kept))
    assert max(differences) < TOLERANCE
    assert len(counts) > IMAGES // 4 or policy.get("budget", {})["type"] != "energy", (
        "an energy budget follows the image"
    )
    record_property("cases", len(differences))
    record_property("worst_logprob_difference", max(differences))
    record_property("ties", ties)


def test_features_are_those_of_transformers(cases: list[Case], features: Callable[[Case], VisualFeatures]) -> None:
    for case in cases:
        torch.testing.assert_close(features(case).embeds, case.embeds, rtol=0, atol=1e-4)


def test_one_wrong_token_of_128_would_be_seen(
    cached: Engine, reference: Reference, cases: list[Case], features: Callable[[Case], VisualFeatures]
) -> None:
    policy = POLICIES["tokens-128"]
    for case in cases:
        answer = ask(cached, case, policy)
        kept = plan(reference, case, features(case), policy).kept
        dropped = sorted(set(range(576)) - set(kept.tolist()))
        wrong = torch.cat([kept[:64], kept[65:], torch.tensor([dropped[len(dropped) // 2]])]).sort().values
        logprobs = reference.logprobs(answer.prompt_ids, [case.embeds[wrong]], answer.token_ids)
        assert worst(answer, logprobs) > 2 * TOLERANCE


def test_the_text_decides_which_tokens_stay(
    reference: Reference, cases: list[Case], features: Callable[[Case], VisualFeatures]
) -> None:
    policy = POLICIES["tokens-64"]
    for case in cases:
        with_text = plan(reference, case, features(case), policy).kept
        without = plan(reference, case._replace(nouns=()), features(case), policy).kept
        assert torch.equal(with_text, without) == (case.nouns == ())

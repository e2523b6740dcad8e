"""What an image and a text decide, over LLaVA's images on the real engine; `test_families.py` checks the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import Answer, Ask, Engine, ask_about
from tests.support.images import sample_images
from tests.support.unpruned import UnprunedReference
from vllm_vtprune import PruningPlan, PruningPolicy, plan_tokens

pytestmark = pytest.mark.engine

IMAGES = 20
QUESTIONS = {
    "What does the astronaut wear?": ("astronaut",),
    "Where is the cat, and where is the cup?": ("cat", "cup"),
    "Is there a bus at the harbour?": ("bus", "harbour"),
    "What is it?": (),  # nothing to condition on
}
CASES = [(number, *list(QUESTIONS.items())[number % len(QUESTIONS)]) for number in range(IMAGES)]


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> UnprunedReference:
    return UnprunedReference(checkpoint)


def ask(engine: Engine, number: int, question: str, policy: dict[str, Any]) -> Answer:
    """About an image that the client calls by its number."""
    image = sample_images(IMAGES)[number]
    return engine.ask(Ask(ask_about(question), [image], policy, [f"exactness-{number}"]))


def plan(
    engine: Engine, reference: UnprunedReference, number: int, nouns: tuple[str, ...], policy: dict[str, Any]
) -> PruningPlan:
    features = engine.runtime.local.cache.get(f"exactness-{number}")
    return plan_tokens(features, PruningPolicy.parse(policy), reference.words(nouns) if nouns else None)


@pytest.mark.parametrize("threshold", [0.9, 0.99])
def test_an_energy_budget_follows_the_image(threshold: float, cached: Engine, reference: UnprunedReference) -> None:
    policy = {"budget": {"type": "energy", "threshold": threshold, "min_tokens": 1}}
    counts = set()
    for number, question, nouns in CASES:
        [report] = ask(cached, number, question, policy).images or ()
        planned = plan(cached, reference, number, nouns, policy)
        assert (report.kept_tokens, report.energy, report.nouns) == (len(planned.kept), planned.energy, nouns)
        counts.add(report.kept_tokens)
    assert len(counts) > IMAGES // 4


def test_the_text_decides_which_tokens_stay(cached: Engine, reference: UnprunedReference) -> None:
    policy = {"budget": {"type": "tokens", "keep": 64}}
    for number, question, nouns in CASES:
        ask(cached, number, question, policy)
        with_text, without = (plan(cached, reference, number, words, policy).kept for words in (nouns, ()))
        assert torch.equal(with_text, without) == (nouns == ())

"""What an image and a text decide, over LLaVA's images on the real engine; `test_families.py` checks the answers."""

from __future__ import annotations

import pytest

from tests.support.engines import Ask, Engine, ask_about, reports
from tests.support.images import sample_images
from vllm_vtprune import PruningPolicy, plan_tokens

pytestmark = pytest.mark.engine

IMAGES = 20
QUESTIONS = {
    "What does the astronaut wear?": ("astronaut",),
    "Where is the cat, and where is the cup?": ("cat", "cup"),
    "Is there a bus at the harbour?": ("bus", "harbour"),
    "What is it?": (),  # nothing to condition on
}


@pytest.mark.parametrize("threshold", [0.9, 0.99])
def test_an_energy_budget_follows_the_image(threshold: float, cached: Engine) -> None:
    policy = {"budget": {"type": "energy", "threshold": threshold, "min_tokens": 1}}
    counts = set()
    for number, image in enumerate(sample_images(IMAGES)):
        question, nouns = list(QUESTIONS.items())[number % len(QUESTIONS)]
        name = f"exactness-{number}"
        [report] = reports(cached.ask(Ask(ask_about(question), [image], policy, [name])))
        planned = plan_tokens(cached.runtime.local.cache.get(name), PruningPolicy.parse(policy))
        assert (report.kept_tokens, report.energy, report.nouns) == (len(planned.kept), planned.energy, nouns)
        counts.add(report.kept_tokens)
    assert len(counts) > IMAGES // 4

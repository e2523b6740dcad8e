"""What is not pruned says why, and what cannot be asked is refused before anything is encoded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import Ask, Engine, ask_about, reports, running_engine, worst_difference
from tests.support.images import sample_images
from vllm_vtprune.plugin.limits import InputRejected, check_options
from vllm_vtprune.policy import PolicyError

pytestmark = pytest.mark.engine

QUESTION = ask_about("Where is the bus?")


@pytest.mark.parametrize("budget", [{"type": "ratio", "keep": 1.0}, {"type": "tokens", "keep": 5000}])
def test_keeping_every_token_is_the_unpruned_answer(cached: Engine, budget: dict[str, Any]) -> None:
    for image in sample_images(5, stamp=str(budget["keep"])):
        answer = cached.ask(Ask(QUESTION, [image], {"budget": budget}))
        unpruned = cached.ask(Ask(QUESTION, [image]))  # from the engine's own vision encoder
        [report] = reports(answer)
        assert (report.kept_tokens, report.bypass_reason) == (576, "budget_not_below_tokens")
        assert answer.prompt_ids == unpruned.prompt_ids
        assert answer.token_ids == unpruned.token_ids
        worst_difference(answer.logprobs, unpruned.logprobs)


def test_images_that_come_as_embeddings_are_left_alone(chunked: Engine) -> None:
    embeds = torch.randn(576, 256, generator=torch.Generator().manual_seed(0))
    asked = chunked.ask(Ask(QUESTION, [embeds], {"budget": {"type": "tokens", "keep": 48}}))
    plain = chunked.ask(Ask(QUESTION, [embeds]))
    [report] = reports(asked)
    assert (report.kept_tokens, report.bypass_reason) == (576, "unsupported_modality")
    assert asked.prompt_ids == plain.prompt_ids
    assert asked.token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("pruning", "param"),
    [
        ({"budget": {"type": "tokens", "keep": 0}}, "mm_processor_kwargs.pruning.budget.keep"),
        ({"images": [None, None]}, "mm_processor_kwargs.pruning.images"),
        ({"images": [{"method": "no such"}]}, "mm_processor_kwargs.pruning.images.0.method"),
        ({"texts": [7]}, "mm_processor_kwargs.pruning.texts.0"),
        ("no such preset", "mm_processor_kwargs.pruning"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(cached: Engine, pruning: object, param: str) -> None:
    (image,) = sample_images(1, stamp="refused")
    encoded_before = cached.encodings()
    with pytest.raises(PolicyError) as refusal:
        cached.ask(Ask(QUESTION, [image], pruning))
    assert refusal.value.param == param
    assert cached.encodings() == encoded_before


@pytest.mark.parametrize("key", ["prunning", "prune"])
def test_a_misspelt_entry_is_named(key: str) -> None:
    with pytest.raises(
        InputRejected, match=rf"^mm_processor_kwargs\.{key}: not an option .* \(did you mean pruning\?\);"
    ):
        check_options(frozenset({"max_pixels"}), {key: "fast"})


def test_a_preset_may_stand_in_an_object(cached: Engine) -> None:
    (image,) = sample_images(1, stamp="preset")
    for pruning in ("fast", {"preset": "fast"}, {"preset": "fast", "texts": ["Where?"]}):
        [report] = reports(cached.ask(Ask(QUESTION, [image], pruning)))
        assert report.kept_tokens == 64


def test_a_policy_for_the_whole_engine_is_refused_at_start(checkpoint: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"mm_processor_kwargs\.pruning: set for the whole engine"),
        running_engine(checkpoint, "refused", mm_processor_kwargs={"pruning": "balanced"}),
    ):
        pass

"""Qwen-VL, beside what `test_families.py` asks of every family: positions, sizes, videos.

The engines have every cache on and prefill in chunks smaller than an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.mixtures import ASKED, TOKENS, ask_about_a_video, ask_in_every_order, picture
from tests.engine.test_families import LANDSCAPE, PORTRAIT, QUESTION, Checker, Shown, ratio
from tests.support.engines import TOLERANCE, Ask, Engine, reports, uncached, worst
from tests.support.families import FAMILIES, Chat, Turn
from tests.support.videos import VideoReference
from vllm_vtprune.cache import BoundedTable, FeatureCache

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def checker(
    request: pytest.FixtureRequest, qwen: Engine, qwen3: Engine, qwen_checkpoint: Path, qwen3_checkpoint: Path
) -> Checker:
    engine, checkpoint = (qwen, qwen_checkpoint) if request.param == "qwen2_5_vl" else (qwen3, qwen3_checkpoint)
    return Checker(FAMILIES[request.param], engine, VideoReference(checkpoint), Chat(checkpoint))


def test_other_positions_would_be_seen(
    checker: Checker, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Numbered without gaps, or with the text one later after the image, as `recompute_mrope_positions` has it."""
    reference, run, gaps = checker.reference, checker.reference._run, []
    for index in (PORTRAIT, LANDSCAPE):
        shown = checker.shown(index, ratio(0.5))
        answer = checker.ask(ASKED, [shown])
        image_token = reference.model.config.image_token_id
        after = answer.prompt_ids.index(image_token) + answer.prompt_ids.count(image_token)

        def in_order(positions: torch.Tensor) -> torch.Tensor:
            return torch.arange(positions.shape[-1]).expand_as(positions)

        def later(positions: torch.Tensor, after: int = after) -> torch.Tensor:
            return positions + (torch.arange(positions.shape[-1]) >= after)

        for wrong in (in_order, later):

            def moved(inputs: Any, change: Any, wrong: Any = wrong) -> Any:
                def changed(keywords: Any) -> Any:
                    pruned = change(keywords)
                    return pruned | {"position_ids": wrong(pruned["position_ids"])}

                return run(inputs, changed)

            with monkeypatch.context() as patch:
                patch.setattr(reference, "_run", moved)
                prompt = checker.chat.prompt(ASKED)
                logprobs = reference.logprobs(prompt, [shown.image], [checker.kept(shown)], answer.token_ids)
            gaps.append(worst(answer, logprobs))
    assert min(gaps) > 2 * TOLERANCE
    record_property("smallest_gap", min(gaps))


def test_pruned_unpruned_and_cached_images_in_every_order(checker: Checker) -> None:
    ask_in_every_order(checker)


def test_an_item_left_by_a_stock_request_is_taken_between_pruned_ones(checker: Checker) -> None:
    shown = [Shown(f"left-{i}", picture(i, (3, 2), "left"), policy) for i, policy in enumerate((False, TOKENS))]
    checker.engine.ask(replace(checker.request(ASKED, shown[:1]), pruning=None))
    checker.ask([Turn(QUESTION, 2)], shown)


def test_videos_pass_unpruned_in_either_order(checker: Checker) -> None:
    ask_about_a_video(checker, "<|video_pad|>")


def grid(checker: Checker, image: Image.Image, **options: Any) -> tuple[int, int]:
    """Rows and columns of an image's tokens in transformers. `options`: of its image processor."""
    inputs = checker.reference.processor.image_processor(images=[image], return_tensors="pt", **options)
    [[_, rows, columns]] = inputs["image_grid_thw"].tolist()
    return rows // 2, columns // 2


def test_the_size_asked_for_is_the_size_pruned(checker: Checker) -> None:
    image, engine, counts = picture(0, (5, 4), "size"), checker.engine, set()
    for options in ({}, {"max_pixels": 56_000}, {"max_pixels": 80_000}, {"min_pixels": 400_000}):
        encoded_before = engine.encodings()
        answer = engine.ask(Ask(checker.chat.prompt(ASKED), [image], ratio(0.5), processor_kwargs=options))
        [report] = reports(answer)
        rows, columns = grid(checker, image, **options)
        assert report.visual_tokens == rows * columns
        assert engine.encodings() - encoded_before == 1
        counts.add(report.visual_tokens)
    assert len(counts) == 4


def test_a_report_that_was_forgotten_is_made_anew_at_the_size_asked_for(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's cache holds the item; ours knows neither what was done to it nor its features."""
    image, options = picture(0, (5, 4), "forgotten"), {"max_pixels": 56_000}
    engine = checker.engine
    request = Ask(checker.chat.prompt(ASKED), [image], ratio(0.5), processor_kwargs=options)
    first = engine.ask(request)
    monkeypatch.setattr(engine.runtime, "planned", BoundedTable(8))
    monkeypatch.setattr(engine.runtime.local, "cache", FeatureCache(2**30))
    again = engine.ask(request)
    assert uncached(again.images) == uncached(first.images)
    assert [report.cached for report in reports(again)] == [True]
    [features] = engine.runtime.local.cache._entries.values()
    assert features.grid == grid(checker, image, **options)


def test_keeping_every_token_is_the_unpruned_answer(checker: Checker) -> None:
    answer = checker.ask(ASKED, [Shown("all", picture(1, (1, 2), "all"), {"budget": {"type": "tokens", "keep": 5000}})])
    assert [report.bypass_reason for report in reports(answer)] == ["budget_not_below_tokens"]


def test_the_text_of_a_prompt_is_what_its_turns_say(checker: Checker) -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # not all templates have it
    prompt = checker.chat.prompt([Turn("Where is the bus?", 1), Turn("Is it at the harbour?", 1)])
    prompt = system + prompt.removeprefix(system)
    images = [picture(index, (1, 1), "text") for index in (0, 1)]
    answer = checker.engine.ask(Ask(prompt, images, {"budget": {"type": "tokens", "keep": 4}}))
    assert [report.nouns for report in reports(answer)] == [("bus", "dog", "harbour")] * 2

"""Borders and duplicates of pages that Qwen2.5-VL reads, selected in the API process and in the engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.engines import Answer, Ask, Engine, assert_same, reports
from tests.support.families import Chat, Turn
from vllm_vtprune.report import ImageReport

pytestmark = pytest.mark.engine

UNIT = 28
ALL = {"budget": {"type": "ratio", "keep": 1.0}}
HALF = {"budget": {"type": "ratio", "keep": 0.5}}


def page(stamp: int) -> Image.Image:
    """12 x 10 tokens: a border of 2 of them around noise, in whose middle is a blank line of 2 x 6 tokens."""
    pixels = np.full((12 * UNIT, 10 * UNIT, 3), 255, np.uint8)
    inside = slice(2 * UNIT, 10 * UNIT), slice(2 * UNIT, 8 * UNIT)
    pixels[inside] = np.random.default_rng(stamp).integers(0, 250, (8 * UNIT, 6 * UNIT, 3), dtype=np.uint8)
    pixels[5 * UNIT : 7 * UNIT, 2 * UNIT : 8 * UNIT] = 255
    return Image.fromarray(pixels)


def ask(engine: Engine, image: Image.Image, pruning: dict[str, Any]) -> Answer:
    prompt = Chat(Path(engine.llm.model_config.model)).prompt([Turn("What does it say?", 1)])
    return engine.ask(Ask(prompt, [image], pruning))


def report_of(answer: Answer) -> ImageReport:
    [image] = reports(answer)
    return image


@pytest.mark.parametrize("placement", ["api", "engine"])
def test_a_page_loses_its_borders_and_its_duplicates(qwen: Engine, placement: Any) -> None:
    if placement == "engine" and qwen.model_runner == "V1":
        placement = "auto"  # M-RoPE: the API process selects
    qwen.select_in(placement)
    try:
        picture = page(1)
        counts = {}
        for name, fields in {
            "neither": {},
            "crop": {"crop_borders": True},
            "dedup": {"dedup": True},
            "both": {"crop_borders": True, "dedup": True},
        }.items():
            image = report_of(ask(qwen, picture, {**ALL, **fields}))
            counts[name] = (image.visual_tokens, image.kept_tokens, image.border_tokens, image.duplicate_tokens)
            assert image.lossless_reason is None
        assert counts == {
            "neither": (120, 120, None, None),
            "crop": (120, 48, 72, None),
            "dedup": (120, 37, None, 83),
            "both": (120, 37, 72, 11),
        }
        image = report_of(ask(qwen, picture, {**HALF, "crop_borders": True, "dedup": True}))
        assert (image.kept_tokens, image.duplicate_tokens) == (19, 11), "half of 37"
    finally:
        qwen.select_in("api")


def test_a_cropped_page_is_the_page_without_its_borders(qwen: Engine) -> None:
    picture = page(2)
    cropped = picture.crop((2 * UNIT, 2 * UNIT, 8 * UNIT, 10 * UNIT))
    answer = ask(qwen, picture, {**HALF, "crop_borders": True})
    expected = ask(qwen, cropped, HALF)
    assert (answer.prompt_ids, answer.token_ids) == (expected.prompt_ids, expected.token_ids)
    again = ask(qwen, picture, {**HALF, "crop_borders": True})
    assert_same(again, answer)
    assert report_of(again).cached
    whole = ask(qwen, picture, HALF)
    assert len(whole.prompt_ids) > len(answer.prompt_ids), "another item"


def test_tokens_without_duplicates_keep_their_positions(qwen: Engine) -> None:
    """Of a page without duplicates, dedup changes nothing."""
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 250, (8 * UNIT, 6 * UNIT, 3), dtype=np.uint8))
    answer, expected = ask(qwen, noise, {**HALF, "dedup": True}), ask(qwen, noise, HALF)
    assert (answer.prompt_ids, answer.token_ids) == (expected.prompt_ids, expected.token_ids)
    assert report_of(answer).duplicate_tokens == 0


def test_a_model_of_fixed_resolution_says_why_not(cached: Engine) -> None:
    answer = cached.ask(
        Ask("USER: <image>\nWhat? ASSISTANT:", [page(4)], {"crop_borders": True, "dedup": True, **HALF})
    )
    image = report_of(answer)
    assert (image.border_tokens, image.duplicate_tokens) == (None, None)
    assert image.lossless_reason == (
        "crop_borders: this model resizes images to fixed sizes; "
        "dedup: this model's visual tokens have no positions of their own"
    )

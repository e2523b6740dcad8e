"""What Gemma's prompts have that others do not: line feeds that merge, and images read in both directions.

vLLM's CPU build reads every image causally, so what is read in both directions is told by the ranges that its model
runners make of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma4AudioConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.worker.gpu.attn_utils import compute_mm_prefix_ranges

from tests.support.images import sample_images
from tests.support.processors import config_of, process_prompt, processor_of
from vllm_vtprune.plugin import vision
from vllm_vtprune.plugin.family import parameters_in_transformers
from vllm_vtprune.plugin.limits import InputRejected
from vllm_vtprune.plugin.request import REPORT_KEY
from vllm_vtprune.plugin.unpruned import UnprunedProcessor
from vllm_vtprune.policy import PolicyError
from vllm_vtprune_checkpoints.gemma3 import write_gemma3_checkpoint
from vllm_vtprune_checkpoints.gemma4 import write_gemma4_checkpoint

WINDOW = 32
"""Of the Gemma 4 below, whose square image has 64 tokens."""


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3_checkpoint(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma4_checkpoint(tmp_path_factory.mktemp("large"), large=True, sliding_window=WINDOW)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma4_checkpoint(tmp_path_factory.mktemp("small"), sliding_window=WINDOW)


def processed(processor: Any, text: str, keep: list[int | None], **options: object) -> Any:
    """A prompt with one square image for each of `keep`, of whose tokens so many are kept; None: it is not pruned."""
    policies = [False if k is None else {"budget": {"type": "tokens", "keep": k}} for k in keep]
    tokens = processor.info.get_tokenizer().encode(text, add_special_tokens=False)
    images = [image.resize((256, 256)) for image in sample_images(len(keep))]
    pruning = {"images": policies, "texts": ["Where is the cat?"] * len(keep)}
    return process_prompt(processor, tokens, images, pruning=pruning, **options)


def ranges_of(result: Any, window: int | None) -> list[tuple[int, int]]:
    """First and last token of each run that is read in both directions, as either model runner has them."""
    places = result["mm_placeholders"]["image"]
    features = [SimpleNamespace(modality="image", mm_position=place) for place in places]
    ranges = compute_mm_prefix_ranges(["request"], {"request": features}, window)[0]  # type: ignore[dict-item]
    assert ranges == [span for place in places for span in place.extract_embeds_range()]
    return ranges


def runs(tokens: list[int], wanted: int) -> list[tuple[int, int]]:
    """First and last place of each run of a token."""
    places = [place for place, token in enumerate(tokens) if token == wanted]
    begins = [place for place in places if place - 1 not in places]
    return list(zip(begins, [place for place in places if place + 1 not in places], strict=True))


@pytest.mark.parametrize("keep", [[5, 40], [40, 5], [5, None], [None, 5], [1, 1]], ids=str)
@pytest.mark.parametrize("text", ["Cat\n<start_of_image><start_of_image>\n\nDog", "<start_of_image><start_of_image>"])
def test_line_feeds_of_adjacent_images_merge_whatever_is_kept(gemma3: Path, text: str, keep: list[int | None]) -> None:
    """The prompt is the one that the tokenizer makes of the text, and a range holds exactly the kept tokens."""
    processor = processor_of(gemma3)
    result = processed(processor, text, keep)
    counts = [64 if k is None else k for k in keep]
    written = text
    for count in counts:
        image = f"\n\n<new_image>{'<image_soft_token>' * count}<end_of_image>\n\n"
        written = written.replace("<start_of_image>", image, 1)
    tokenizer = processor.info.get_tokenizer()
    written = written.replace("<new_image>", "<start_of_image>")
    assert result["prompt_token_ids"] == tokenizer.encode(written, add_special_tokens=False)
    ranges = ranges_of(result, processor.info.ctx.model_config.get_sliding_window())
    assert ranges == runs(result["prompt_token_ids"], processor.image_token_id)
    assert [last - first + 1 for first, last in ranges] == counts


def test_a_range_of_gemma_4_holds_exactly_the_kept_tokens(large: Path) -> None:
    processor = processor_of(large)
    result = processed(processor, "<|image|>Cat<|image|>", [40, 50])
    ranges = ranges_of(result, None)
    assert ranges == runs(result["prompt_token_ids"], processor.image_token_id)
    assert [last - first + 1 for first, last in ranges] == [40, 50]


@pytest.mark.parametrize("keep", [1, WINDOW - 1, WINDOW])
def test_a_budget_that_would_change_the_mask_is_refused(large: Path, keep: int) -> None:
    with pytest.raises(PolicyError, match=f"{keep} kept tokens .* window of {WINDOW} .* its 64 tokens") as refused:
        processed(processor_of(large), "<|image|>", [keep])
    assert refused.value.param == "pruning.budget"
    assert f"more than {WINDOW}" in refused.value.accepted


def test_budgets_that_leave_the_mask_as_it_is_are_taken(large: Path, small: Path, gemma3: Path) -> None:
    """Above the window; of a model that reads images causally; of one whose image fits into the window."""
    for checkpoint, text, keep in [
        (large, "<|image|>", WINDOW + 1),
        (small, "<|image|>", WINDOW),
        (gemma3, "<start_of_image>", WINDOW),
    ]:
        [report] = processed(processor_of(checkpoint), text, [keep])[REPORT_KEY].images
        assert (report.kept_tokens, report.visual_tokens) == (keep, 64)


@pytest.mark.parametrize("nest", [dict, lambda **options: {"images_kwargs": options}], ids=["flat", "nested"])
def test_an_engine_that_crops_images_prunes_nothing(gemma3: Path, nest: Callable[..., dict[str, Any]]) -> None:
    processor = processor_of(gemma3, mm_processor_kwargs=nest(do_pan_and_scan=True))
    assert isinstance(processor, UnprunedProcessor)
    [report] = processed(processor, "<start_of_image>", [5])[REPORT_KEY].images
    assert (report.kept_tokens, report.bypass_reason) == (64, "unsupported_model")


@pytest.mark.parametrize("nest", [dict, lambda **options: {"images_kwargs": options}], ids=["flat", "nested"])
def test_a_request_cannot_have_images_cropped(gemma3: Path, nest: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(InputRejected, match="do_pan_and_scan"):
        processed(processor_of(gemma3), "<start_of_image>", [5], **nest(do_pan_and_scan=True))


def test_a_request_may_ask_for_more_tokens(small: Path) -> None:
    [report] = processed(processor_of(small), "<|image|>", [40], max_soft_tokens=140)[REPORT_KEY].images
    assert (report.kept_tokens, report.visual_tokens) == (40, 121)
    with pytest.raises(InputRejected, match="mm_processor_kwargs"):
        processed(processor_of(small), "<|image|>", [40], max_soft_tokens=71)


def test_what_hears_is_neither_built_nor_counted(small: Path) -> None:
    """Of a model with an encoder of sounds."""
    config = config_of(small)
    images_only = parameters_in_transformers(config.hf_config)
    config.hf_config.audio_config = Gemma4AudioConfig()
    built = vision.build(config, torch.device("cpu"))
    family = MULTIMODAL_REGISTRY.create_processor(config).family
    assert family.parameters(config.hf_config) == images_only < parameters_in_transformers(config.hf_config)
    assert built.num_parameters == images_only


@pytest.mark.parametrize(
    ("checkpoint", "mark"), [("gemma3", "<start_of_image>"), ("small", "<|image|>")], ids=["gemma3", "gemma4"]
)
def test_the_text_of_a_prompt_is_what_was_said(checkpoint: str, mark: str, request: pytest.FixtureRequest) -> None:
    """Without the names of the speakers, of which ``model`` is one."""
    processor = processor_of(request.getfixturevalue(checkpoint))
    tokenizer = processor.info.get_tokenizer()
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And the dog?"},
    ]
    hf_processor = processor.info.get_hf_processor()
    text = hf_processor.apply_chat_template(turns, add_generation_prompt=True)
    assert mark in text
    prompt = processor.prompt_text(tokenizer.encode(text, add_special_tokens=False))
    assert prompt.split() == ["What", "is", "it?", "A", "cat.", "And", "the", "dog?"]

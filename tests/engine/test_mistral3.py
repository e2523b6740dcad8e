"""Mistral 3: what stands in the prompt for a pruned image, and what of a prompt a question is read from."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.support.processors import process_prompt, processor_of
from vllm_vtprune.report import ImageReport
from vllm_vtprune_checkpoints.mistral3 import write_mistral3_checkpoint
from vllm_vtprune_evaluation.photo import photograph

PROMPT = "<s>[SYSTEM_PROMPT]You write to a librarian.[/SYSTEM_PROMPT][INST][IMG]Where is the dog?[/INST]"
ROWS, COLUMNS = 8, 11  # of 28 x 28 pixels, of an image of 300 x 200


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_of(write_mistral3_checkpoint(tmp_path_factory.mktemp("mistral3")))


def placed(processor: Any, policy: object) -> tuple[list[str], ImageReport]:
    """The tokens that stand for an image, and its report."""
    out = process_prompt(processor, PROMPT, [photograph().resize((300, 200))], pruning=policy)
    [place] = out["mm_placeholders"]["image"]
    tokenizer = processor.info.get_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(out["prompt_token_ids"][place.offset : place.offset + place.length])
    assert [token == "[IMG]" for token in tokens] == place.is_embed.tolist()
    [report] = out["pruning"].images
    return tokens, report


@pytest.mark.parametrize("keep", [1, 3, 20, ROWS * COLUMNS - 1])
def test_a_row_ends_as_long_as_it_has_a_token(keep: int, processor: Any) -> None:
    tokens, report = placed(processor, {"method": "divprune", "budget": {"type": "tokens", "keep": keep}})
    assert (tokens.count("[IMG]"), tokens[-1], tokens.count("[IMG_END]")) == (keep, "[IMG_END]", 1)
    assert (report.visual_tokens, report.kept_tokens) == (ROWS * COLUMNS, keep)
    assert tokens.count("[IMG_BREAK]") < min(keep, ROWS)
    assert all("[IMG]" in pair for pair in pairwise(["[IMG_BREAK]", *tokens])), "no row is empty"


def test_all_tokens_are_the_image_of_stock_vllm(processor: Any) -> None:
    tokens, _ = placed(processor, {"method": "divprune", "budget": {"type": "ratio", "keep": 1.0}})
    stock, _ = placed(processor, False)
    assert tokens == stock == [*([*(["[IMG]"] * COLUMNS), "[IMG_BREAK]"] * ROWS)[:-1], "[IMG_END]"]


def test_the_question_is_not_what_the_system_says(processor: Any) -> None:
    assert placed(processor, {})[1].nouns == ("dog",)

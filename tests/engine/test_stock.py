"""With pruning off, vLLM with the plugin answers bit for bit as vLLM without it."""

import math
from typing import Any

import pytest

from tests.engine.stock_answers import IMAGES, TEXTS

pytestmark = pytest.mark.engine


def test_one_process_is_stock_and_the_other_is_ours(stock_runs: dict[str, dict[str, Any]]) -> None:
    without, with_plugin = stock_runs["without"], stock_runs["with"]
    assert without["processor"] == "LlavaMultiModalProcessor"
    assert without["worker"]["model_class"] == "vllm.model_executor.models.llava.LlavaForConditionalGeneration"
    assert not [name for name in without["worker"]["modules"] if name.startswith("vllm_vtprune.plugin")]
    assert with_plugin["processor"] == "PrunedLlavaProcessor"
    assert with_plugin["worker"]["model_class"] == "vllm_vtprune.plugin.families.llava.PrunedLlavaForConditionalGeneration"


@pytest.mark.parametrize("variant", ["absent", "false"])
def test_off_is_stock(stock_runs: dict[str, dict[str, Any]], variant: str) -> None:
    stock, ours = stock_runs["without"]["answers"]["absent"], stock_runs["with"]["answers"][variant]
    assert len(stock) == IMAGES + 2 + len(TEXTS)
    for (prompt_ids, token_ids, logprobs), answer in zip(stock, ours, strict=True):
        assert len(token_ids) == len(logprobs) == 8
        assert all(math.isfinite(value) for step in logprobs for _, value in step)
        assert answer == [prompt_ids, token_ids, logprobs]  # floats too: not a bit may differ
    assert len({tuple(token_ids) for _, token_ids, _ in stock}) > IMAGES, "the answers depend on what was asked"


def test_off_never_loads_the_tower(stock_runs: dict[str, dict[str, Any]]) -> None:
    for moment in ("started", "served"):
        frontend = stock_runs["with"][moment]
        assert frontend["runtimes"] >= 1
        assert frontend["towers"] == 0
        assert "vllm_vtprune.plugin.vision" not in frontend["modules"]

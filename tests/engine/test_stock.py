"""With pruning off, vLLM with the plugin is vLLM without it: fresh engines, which never prune."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.stock_families import WITHOUT_PLUGIN, fresh_process, serve
from tests.support.families import FAMILIES

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """LLaVA's, with the plugin and without it, at the same time."""
    checkpoint = FAMILIES["llava"].write(tmp_path_factory.mktemp("llava"))
    with fresh_process({}) as with_plugin, fresh_process(WITHOUT_PLUGIN) as without:
        plugin_run = with_plugin.submit(serve, "llava", checkpoint, (False, None))  # the very first request is unpruned
        stock = without.submit(serve, "llava", checkpoint)
        return plugin_run.result(), stock.result()


def test_off_is_stock(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    plugin_run, stock = runs
    assert stock["worker"]["model_class"] == "vllm.model_executor.models.llava.LlavaForConditionalGeneration"
    pruned = "vllm_vtprune.plugin.families.llava.PrunedLlavaForConditionalGeneration"
    assert plugin_run["worker"]["model_class"] == pruned
    assert plugin_run["answers"] == stock["answers"] * 2  # floats too: not a bit may differ


@pytest.mark.parametrize("moment", ["started", "served"])
def test_off_never_load_the_encoder(moment: str, runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    frontend = runs[0][moment]
    assert "vllm_vtprune.plugin.families.llava" in frontend["modules"]
    assert "vllm_vtprune.plugin.vision" not in frontend["modules"]
    assert frontend["runtimes"] >= 1
    assert frontend["vision_encoders"] == 0

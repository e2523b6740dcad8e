"""`vtprune demo --family`: a real server and one streamed request, unpruned and pruned, for each family."""

import json
from pathlib import Path

import pytest

from tests.support.programs import run_module

pytestmark = [pytest.mark.engine, pytest.mark.verify]


VISUAL_TOKENS = {"qwen2_5_vl": 18 * 18, "qwen3_vl": 16 * 16, "llava_next": 24 * 24 + 48 * 49, "internvl": 16 * 16}
"""Of the photograph, which is square: InternVL takes it as a single tile."""


@pytest.mark.parametrize(("family", "visual_tokens"), VISUAL_TOKENS.items())
def test_one_photograph_unpruned_and_pruned(family: str, visual_tokens: int, tmp_path: Path) -> None:
    options = ["--family", family, "--json", "--out", str(tmp_path / "demo.png")]
    done = run_module("vllm_vtprune.cli", "demo", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["weights"] == "random"
    [unpruned], [pruned] = (result[arm]["pruning"]["images"] for arm in ("unpruned", "pruned"))
    assert unpruned["visual_tokens"] == unpruned["kept_tokens"] == pruned["visual_tokens"] == visual_tokens
    assert 32 <= pruned["kept_tokens"] < visual_tokens
    assert pruned["energy"] >= 0.99
    assert "astronaut" in pruned["nouns"]
    assert pruned["bypass_reason"] is None

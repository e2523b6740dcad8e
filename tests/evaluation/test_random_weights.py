"""Whatever a checkpoint with random weights gives is said to mean nothing; no engine runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_vtprune_checkpoints import RANDOM_WEIGHTS, TRAINED
from vllm_vtprune_evaluation import demo as command
from vllm_vtprune_evaluation.demo import Subject, demo
from vllm_vtprune_evaluation.inspection import inspect
from vllm_vtprune_evaluation.photo import photograph

ASKED = [
    (["--family", "internvl"], "random"),
    ([], "trained"),
    (["--model", str(TRAINED)], None),
]
"""Options, and what the weights are then; of a named model nobody knows."""


KEPT = {"grid": [24, 24], "runs": [[0, 60], [100, 4]], "tiles": None, "view": [0.0, 0.0, 1.0, 1.0]}


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    image = {"visual_tokens": 576, "kept_tokens": 64, "energy": None, "kept": KEPT}
    outcome = {"ttft_ms": 9.0, "answer": "a kiosk", "pruning": {"budget": None, "images": [image]}}

    def run(subject: Subject, model: str | None) -> dict[str, dict[str, Any]]:
        return {"unpruned": outcome, "pruned": outcome}

    monkeypatch.setattr(command, "run", run)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(("argv", "weights"), ASKED)
def test_demo_says_so_above_the_answers(
    argv: list[str], weights: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.png"
    argv = [*argv, "--out", str(out)]
    demo(argv)
    with Image.open(out) as drawn:
        assert drawn.width > 1.9 * drawn.height, "the picture, and what is kept of it"
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0] == RANDOM_WEIGHTS) == (weights == "random")
    assert any("a kiosk" in line for line in lines)
    demo([*argv, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == weights
    assert result["pruned"]["answer"] == "a kiosk"


@pytest.mark.parametrize(("argv", "weights"), ASKED)
def test_inspect_says_so_above_what_is_kept(
    argv: list[str], weights: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    photograph().save(photo)
    argv = [str(photo), *argv, "--pruning", "balanced", "--out", str(tmp_path / "kept.png")]
    inspect(argv)
    *above, kept, _ = capsys.readouterr().out.splitlines()
    assert kept.startswith("balanced: resprune keeps ")
    assert (above[-1:] == [RANDOM_WEIGHTS]) == (weights == "random")
    if weights is None:
        inspect([*argv, "--json"])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["weights"] is None

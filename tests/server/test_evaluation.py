"""`vtprune eval` from end to end, on a model that knows nothing."""

import json
from pathlib import Path

import pytest

from evaluation.command import evaluate
from tests.support.chat import VISUAL_TOKENS, Server
from vllm_vtprune.demo.checkpoint import tiny_checkpoint

pytestmark = pytest.mark.engine


def test_every_question_is_asked_once_in_every_way(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--url", server.url, "--model", str(tiny_checkpoint()), "--out", str(tmp_path), "--json"]
    options += ["--questions", "8", "--methods", "random,random3x3", "--keep", "64,100", "--presets", "fast"]
    evaluate(options)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    by_arm = {result["arm"]: result for result in found}
    assert list(by_arm) == ["unpruned", "random@64", "random@100", "random3x3@64", "fast"]
    assert {arm: result["mean_tokens"] for arm, result in by_arm.items()} == {
        "unpruned": VISUAL_TOKENS,
        "random@64": 64,
        "random@100": 100,
        "random3x3@64": 64,
        "fast": 64,
    }
    assert {result["questions"] for result in found} == {8}
    answers = (tmp_path / "answers.jsonl").read_text()
    assert len(answers.splitlines()) == 1 + 8 * len(by_arm)
    assert "| random3x3@64 | 64.0 |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "accuracy.png").exists()

    evaluate(options)
    capsys.readouterr()
    assert (tmp_path / "answers.jsonl").read_text() == answers, "the same command asks nothing again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "argument --methods: 'magic' given; expected any of resprune,"),
        (["--keep", "0"], "argument --keep: '0' given; expected a whole number from 1"),
        (["--presets", "slow"], "argument --presets: 'slow' given; expected any of off, quality,"),
    ],
)
def test_options_that_are_none_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        evaluate(options)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err

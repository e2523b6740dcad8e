"""`vtprune eval` and `vtprune calibrate` from end to end, on a model that knows nothing."""

import json
from pathlib import Path

import pytest

from evaluation.calibrate import calibrate
from evaluation.command import evaluate
from tests.support.chat import VISUAL_TOKENS, Server, user
from vllm_vtprune.demo.checkpoint import tiny_checkpoint
from vllm_vtprune.demo.command import data_url
from vllm_vtprune.demo.photo import photograph
from vllm_vtprune.policy import EnergyBudget
from vllm_vtprune.presets import read_presets

pytestmark = pytest.mark.engine


def test_every_question_is_asked_once_in_every_way(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--url", server.url, "--model", str(tiny_checkpoint()), "--out", str(tmp_path), "--json"]
    options += [
        "--questions",
        "8",
        "--methods",
        "random,random3x3",
        "--keep",
        "64,100",
        "--presets",
        "fast",
        "--gallery",
    ]
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
    assert {file.name for file in tmp_path.glob("*.png")} == {"accuracy.png", "gallery.png"}

    evaluate(options)
    capsys.readouterr()
    assert (tmp_path / "answers.jsonl").read_text() == answers, "the same command asks nothing again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "argument --methods: 'magic' given; expected any of resprune,"),
        (["--keep", "0"], "argument --keep: '0' given; expected a whole number from 1"),
        (["--ablation", "resprune-seed", "--keep", "64"], "--ablation: a table has its own budgets"),
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


@pytest.mark.parametrize(
    ("url", "message"),
    [("http://127.0.0.1:9", "http://127.0.0.1:9: Connection error"), (None, "name it with --model")],
)
def test_a_server_that_cannot_be_asked_is_told_of(
    server: Server, url: str | None, message: str, tmp_path: Path
) -> None:
    options = ["--url", url or server.url, "--questions", "1", "--methods", "none", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=message):
        evaluate(options)  # of the model that comes with the package, which this server does not serve


def test_a_preset_is_written_that_the_server_reads(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph().save(tmp_path / "astronaut.png")
    lines = [{"image": "astronaut.png", "question": question} for question in ("Who is this?", "What is behind her?")]
    (tmp_path / "sample.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--url", server.url, "--model", str(tiny_checkpoint()), "--sample", str(tmp_path / "sample.jsonl")]
    options += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "presets.toml"), "--name", "mine"]

    calibrate([*options, "--tokens", "48"])
    assert "preset mine keeps 48.0 tokens" in capsys.readouterr().out
    policy = read_presets(tmp_path / "presets.toml")["mine"]
    assert isinstance(policy.budget, EnergyBudget)
    message = user("Who is this?", data_url(photograph()))
    report = server.ask(messages=[message], pruning=policy.dump())["pruning"]
    assert report["images"][0]["kept_tokens"] == 48

    options[options.index(str(tmp_path / "presets.toml"))] = str(tmp_path / "more.toml")
    with pytest.raises(SystemExit, match="nothing that was tried retains 1"):
        calibrate([*options, "--retain", "1"])
    shown = capsys.readouterr().out
    assert "| mean tokens | threshold | retained |" in shown

"""`vtprune demo`, `eval` and `calibrate` from end to end, on a model that knows nothing."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.chat import VISUAL_TOKENS, Server, user
from tests.support.forked import context
from vllm_vtprune.policy import EnergyBudget
from vllm_vtprune.presets import read_presets
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_evaluation.ablations import ABLATIONS, SOLVERS
from vllm_vtprune_evaluation.calibrate import calibrate
from vllm_vtprune_evaluation.command import evaluate
from vllm_vtprune_evaluation.demo import POLICY, demo
from vllm_vtprune_evaluation.photo import data_url, photograph

pytestmark = pytest.mark.engine


def test_the_demo_asks_once_unpruned_and_once_pruned(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_vtprune_evaluation.demo.announced_server", lambda *arguments: nullcontext(server.url))
    demo(["--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == ["question", "right_answer", "weights", "unpruned", "pruned"]
    for arm in (result["unpruned"], result["pruned"]):
        assert set(arm) == {"ttft_ms", "answer", "pruning"}
        assert arm["pruning"]["timings_ms"]["ttft"] <= arm["ttft_ms"], "seen by the client, later than by the server"
        [image] = arm["pruning"]["images"]
        assert (image["visual_tokens"], image["bypass_reason"]) == (VISUAL_TOKENS, None)
    unpruned, pruned = result["unpruned"]["pruning"], result["pruned"]["pruning"]
    assert (unpruned["method"], pruned["method"]) == ("none", POLICY["method"])
    assert unpruned["images"][0]["kept_tokens"] == VISUAL_TOKENS
    assert 32 <= pruned["images"][0]["kept_tokens"] < VISUAL_TOKENS
    assert pruned["images"][0]["energy"] >= pruned["budget"]["threshold"] == 0.99
    assert pruned["images"][0]["nouns"], "of the question about the scene"


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


def test_offline_answers_are_those_of_the_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With and without a look at the question, merged, and under an energy budget."""
    monkeypatch.setattr("vllm_vtprune_evaluation.offline.CONTEXT", context())
    options = ["--model", str(tiny_checkpoint()), "--questions", "12", "--json"]
    options += ["--methods", "resprune,divprune,tome", "--keep", "48", "--presets", "balanced"]
    texts = []
    for name, where in (("server", ["--url", server.url]), ("offline", ["--offline"])):
        evaluate([*options, *where, "--out", str(tmp_path / name)])
        lines = (tmp_path / name / "answers.jsonl").read_text().splitlines()[1:]
        entries = [json.loads(line) for line in lines]
        texts.append({(entry["arm"], entry["question"]): (entry["text"], entry["tokens"]) for entry in entries})
    capsys.readouterr()
    assert texts[0] == texts[1]
    assert len(texts[0]) == 5 * 12
    assert len(set(texts[0].values())) > 12, "the model does not say the same every time"


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_adaptive_budgets_on_the_server_and_inside_the_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the model that comes with the package: the other is too shallow for pyramids."""
    options = [
        "--out",
        str(tmp_path),
        "--json",
        "--questions",
        "4",
        "--methods",
        "fastervlm",
        "--keep",
        "24",
        "--adaptive",
        "--in-llm",
    ]
    evaluate(options)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_arm = {result["arm"]: result for result in found["results"]}
    assert {"unpruned", "fastervlm@24", "fastervlm+E@24", "transformers", "fastv@24", "fastv+E@24"} <= by_arm.keys()
    assert by_arm["fastervlm@24"]["mean_tokens"] == 24
    assert 12 < by_arm["fastervlm+E@24"]["mean_tokens"] < 48, "on other pictures its mean was 24"
    assert by_arm["transformers"]["accuracy"] == by_arm["unpruned"]["accuracy"]
    assert (tmp_path / "budgets.png").exists()
    assert found["about"]["pictures"] == 1
    assert "--adaptive" in found["about"]["command"]


@pytest.mark.parametrize("table", [*ABLATIONS, pytest.param(SOLVERS, marks=pytest.mark.verify)])
def test_every_table_of_the_papers_is_one_command(
    table: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--url", server.url, "--model", str(tiny_checkpoint()), "--out", str(tmp_path), "--json"]
    evaluate([*options, "--questions", "1", "--ablation", table])
    unpruned, *rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    if table in ABLATIONS:
        assert [row["arm"] for row in rows] == [arm.name for arm in ABLATIONS[table].arms()]
        assert all(row["mean_tokens"] == row["keep"] for row in rows)
    else:
        assert next(row["arm"] for row in rows) == "exact"
        assert len(rows) == 10
        assert all(1 <= row["mean_tokens"] < unpruned["mean_tokens"] for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "argument --methods: 'magic' is not accepted; expected any of resprune,"),
        (["--keep", "0"], "argument --keep: '0' is not accepted; expected a whole number from 1"),
        (["--ablation", "resprune-seed", "--keep", "64"], "--ablation: cannot be combined with --keep"),
        (["--presets", "slow"], "argument --presets: 'slow' is not accepted; expected any of off, quality,"),
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


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_the_smallest_budget_that_retains_enough_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the model that comes with the package, which knows something."""
    monkeypatch.setattr("vllm_vtprune_evaluation.calibrate.SCENE_QUESTIONS", 60)
    calibrate(["--retain", "0.6", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "presets.toml")])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    shares = [float(line[4].strip(" %")) for line in lines]
    chosen = [line[1].strip() for line in lines].index("chosen")
    assert min(shares[: chosen + 1]) >= 60
    assert chosen == len(shares) - 1 or shares[chosen + 1] < 60
    assert isinstance(read_presets(tmp_path / "presets.toml")["calibrated"].budget, EnergyBudget)

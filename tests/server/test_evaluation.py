"""`vtprune demo`, `eval`, `calibrate` and `bench` from end to end, on a model that knows nothing."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.chat import VISUAL_TOKENS, Server, user
from tests.support.forked import context
from vllm_vtprune.presets import read_presets
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_evaluation.ablations import ABLATIONS, SOLVERS
from vllm_vtprune_evaluation.bench.command import bench
from vllm_vtprune_evaluation.calibrate import calibrate
from vllm_vtprune_evaluation.command import evaluate
from vllm_vtprune_evaluation.demo import POLICY, demo
from vllm_vtprune_evaluation.messages import data_url
from vllm_vtprune_evaluation.photo import photograph

pytestmark = pytest.mark.engine


def test_the_demo_asks_once_unpruned_and_once_pruned(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("vllm_vtprune_evaluation.demo.announced_server", lambda *arguments: nullcontext(server.url))
    demo(["--json", "--out", str(tmp_path / "demo.png")])
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
    options += "--questions 8 --methods random,random3x3 --keep 64,100 --presets fast --gallery".split()
    evaluate(options)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    by_arm = {result["arm"]: result for result in results}
    assert list(by_arm) == ["unpruned", "random@64", "random@100", "random3x3@64", "fast"]
    assert {arm: result["mean_tokens"] for arm, result in by_arm.items()} == {
        "unpruned": VISUAL_TOKENS,
        "random@64": 64,
        "random@100": 100,
        "random3x3@64": 64,
        "fast": 64,
    }
    assert {result["questions"] for result in results} == {8}
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
    options = "--questions 4 --methods fastervlm --keep 24 --adaptive --in-llm --json".split()
    evaluate([*options, "--out", str(tmp_path)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_arm = {result["arm"]: result for result in summary["results"]}
    assert {"unpruned", "fastervlm@24", "fastervlm+E@24", "transformers", "fastv@24", "fastv+E@24"} <= by_arm.keys()
    assert by_arm["fastervlm@24"]["mean_tokens"] == 24
    assert 12 < by_arm["fastervlm+E@24"]["mean_tokens"] < 48, "on other pictures its mean was 24"
    assert by_arm["transformers"]["accuracy"] == by_arm["unpruned"]["accuracy"]
    assert (tmp_path / "budgets.png").exists()
    assert summary["about"]["pictures"] == 1
    assert "--adaptive" in summary["about"]["command"]


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

    calibrate([*options, "--tokens", "48", "--methods", "divprune,leverage"])
    out = capsys.readouterr().out
    assert "keeps 48.0 of 576.0 tokens on average and retains" in out
    assert "none were held out" in out, "of one picture"
    policy = read_presets(tmp_path / "presets.toml")["mine"]
    message = user("Who is this?", data_url(photograph()))
    report = server.ask(messages=[message], pruning=policy.dump())["pruning"]
    assert (report["images"][0]["method"], report["images"][0]["kept_tokens"]) == (policy.method, 48)

    options[options.index(str(tmp_path / "presets.toml"))] = str(tmp_path / "more.toml")
    with pytest.raises(SystemExit, match="nothing that was tried retains 1 on the searched pictures"):
        calibrate([*options, "--retain", "1", "--method", "random"])
    assert "budget of random  mean tokens  retained, 95 % interval" in capsys.readouterr().out


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_a_calibrated_preset_keeps_on_other_questions_what_it_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the model that comes with the package, which knows something; the questions are of the test split."""
    calibrate(["--retain", "0.95", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "presets.toml")])
    capsys.readouterr()
    preset = read_presets(tmp_path / "presets.toml")["calibrated"].dump()
    monkeypatch.setattr("vllm_vtprune_evaluation.arms.BUILTIN_PRESETS", {"fast": preset})
    evaluate(
        ["--offline", "--questions", "400", "--methods", "none", "--presets", "fast", "--json", "--out", str(tmp_path)]
    )
    _, calibrated = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert calibrated["mean_tokens"] < 300
    assert calibrated["retained"] >= 0.95 - 0.03, "within the interval of so many questions"


def test_a_running_server_is_benchmarked(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--concurrency 1 4 --requests 4 --pictures 4 --presets balanced thumbnail --size 320x240".split()
    bench(["--url", server.url, *options, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "thumbnail keeps 4% of the visual tokens" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {arm["arm"]: arm["kept_tokens"] for arm in results["arms"]} == {"off": 576, "balanced": 128, "thumbnail": 24}
    assert [level["requests"] for level in results["levels"]] == [4] * 3 + [4] * 3 + [32] * 3
    assert (tmp_path / "report.html").stat().st_size < 2_000_000

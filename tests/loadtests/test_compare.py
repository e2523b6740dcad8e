"""What `make loadtest` concludes from its turns, and the whole of it on real servers."""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loadtests.compare import ARMS, Load, Turns, conclude, ratios_to_stock, tokens_argument
from loadtests.servers import Arm
from tests.loadtests.test_options import parsed
from tests.support.fake_chat import report
from tests.support.programs import run_module
from vllm_vtprune_evaluation.load.records import Record

STOCK, OFF, PRUNED = ARMS


def requests(start: float, ttft: float, count: int = 4, **fields: Any) -> list[Record]:
    """A turn of so many requests of a second each, one after the other."""
    measured = {"ttft": ttft, "e2e": 0.9, "input_tokens": 50, "output_tokens": 4}
    return [Record("FreshImages", start + i, elapsed=1.0, **{**measured, **fields}) for i in range(count)]


def turns(**more: list[list[Record]]) -> Turns:
    """Two rounds in which off is as fast as stock, and balanced twice as fast; the second on a slower machine."""
    return {
        STOCK: [requests(0, 0.4), requests(100, 0.8)],
        OFF: [requests(10, 0.4), requests(110, 0.8)],
        PRUNED: [requests(20, 0.2, count=8, pruning=report(64)), requests(120, 0.4, count=8, pruning=report(64))],
        **more,
    }


def options(out: Path, *arguments: str) -> argparse.Namespace:
    arms = [Arm.parse(arm) for arm in ARMS]
    return argparse.Namespace(out=out, rounds=2, seconds=4, size="tiny", arms=arms, **vars(parsed(*arguments)))


def concluded(turns: Turns, options: argparse.Namespace) -> list[str]:
    return conclude(turns, dict.fromkeys(turns, 1.6), options, Load(users=2), options.out)


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("stock", Arm("stock")),
        ("balanced", Arm("balanced", "auto", "balanced")),
        ("fast@engine", Arm("fast@engine", "engine", "fast")),
        ("0.25@api", Arm("0.25@api", "api", '{"budget": {"type": "ratio", "keep": 0.25}}')),
    ],
)
def test_an_arm_is_a_server_and_a_policy(name: str, arm: Arm) -> None:
    assert Arm.parse(name) == arm
    assert arm.prunes == (name != "stock")
    assert not Arm.parse("off").prunes


@pytest.mark.parametrize(
    ("name", "message"),
    [("fast@gpu", "unknown placement 'gpu'"), ("1.5", "a share of 1.5"), ("1.2.3", "a share of 1.2.3")],
)
def test_no_arm_is_guessed(name: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        Arm.parse(name)


def test_ratios_are_of_what_was_measured_in_the_same_round() -> None:
    ratios = ratios_to_stock(turns())
    assert ratios["balanced / stock, median TTFT"] == "0.500 [0.500, 0.500]"
    assert ratios["off / stock, median TTFT"] == "1.000 [1.000, 1.000]"
    assert ratios["balanced / stock, requests per second"] == "1.000 [1.000, 1.000]"


def test_no_ratio_is_made_up_where_a_round_measured_nothing() -> None:
    ratios = ratios_to_stock(turns(balanced=[requests(20, 0.2), []]))
    assert "balanced / stock, median TTFT" not in ratios
    assert "off / stock, median TTFT" in ratios


def test_turns_are_put_together_without_the_time_between_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert concluded(turns(), options(tmp_path)) == []
    results = {arm: json.loads((tmp_path / f"result-{arm}.json").read_text()) for arm in ARMS}
    assert results[STOCK]["duration"] == 8.0
    assert results[STOCK]["request_throughput"] == 1.0
    assert (results[PRUNED]["completed"], results[PRUNED]["median_ttft_ms"]) == (16, pytest.approx(300))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "users: 2"
    assert shown[1].split() == list(ARMS)
    assert "balanced, CPU time of the API process: 100.0 ms per request" in shown
    assert next(line for line in shown if line.startswith("TTFT median")).split() == [
        "TTFT", "median", "(ms)", "600.0", "600.0", "300.0",
    ]  # fmt: skip
    assert "balanced / stock, median TTFT: 0.500 [0.500, 0.500]" in shown
    assert (tmp_path / "report.html").exists()


def test_promises_are_those_of_the_pruned_arm(tmp_path: Path) -> None:
    assert concluded(turns(), options(tmp_path, "--slo-ttft-p99-ms", "500")) == []
    assert concluded(turns(), options(tmp_path, "--slo-ttft-p99-ms", "300")) == [
        "balanced: ttft p99 was to be 300 ms at most, and is 400.0 ms"
    ]


def test_the_pruned_arm_has_to_prune(tmp_path: Path) -> None:
    unpruned = [requests(20, 0.2, pruning=report(576))]
    assert concluded(turns(balanced=unpruned), options(tmp_path)) == ["balanced: FreshImages: nothing was pruned"]


def test_no_arm_may_fail(tmp_path: Path) -> None:
    cut = turns(stock=[requests(0, 0.4), requests(100, 0.4, error="cut")])
    assert concluded(cut, options(tmp_path)) == ["stock: 4 of 8 requests failed: cut"]


@pytest.mark.parametrize("module", ["loadtests.compare", "loadtests.soak"])
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "python -m {module} --out build/"),
        (["--out", "x", "--users", "0"], 2, "argument --users: '0' is not accepted; expected a whole number from 1"),
        ([], 2, "the following arguments are required: --out"),
    ],
)
def test_help_has_an_example_and_mistakes_are_named(
    module: str,
    arguments: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        import_module(module).main()
    assert ended.value.code == status
    assert message.format(module=module) in "".join(capsys.readouterr())


def test_a_run_says_how_large_its_pictures_are() -> None:
    load = Load(users=1, tokens=2880)
    assert (load.text, load.folder) == ("users: 1, tokens per image: 2880", "users-1-tokens-2880")
    assert load.locust_options == ("--picture", "1680x1344")
    assert tokens_argument("2880") == 2880
    with pytest.raises(argparse.ArgumentTypeError, match="13 tokens make a picture of 1 x 13 tokens; expected"):
        tokens_argument("13")


@pytest.mark.engine
@pytest.mark.verify
def test_pictures_have_as_many_tokens_as_was_asked(tmp_path: Path) -> None:
    arguments = ["--size", "tiny", "--rounds", "1", "--seconds", "2", "--users", "1", "--max-tokens", "2"]
    arguments += ["--tokens-per-image", "16", "279", "--arms", "stock", "fast", "--out", str(tmp_path)]
    done = run_module("loadtests.compare", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    inputs = {}
    for tokens in (16, 279):
        folder = tmp_path / f"users-1-tokens-{tokens}"
        results = {arm: json.loads((folder / f"result-{arm}.json").read_text())["vtprune"] for arm in ("stock", "fast")}
        assert results["fast"]["keep_ratio"] == pytest.approx(round(tokens / 9) / tokens)
        inputs[tokens] = results["stock"]["kinds"]["FreshImages"]["mean_input_tokens"]
        assert f"users: 1, tokens per image: {tokens}\n" in done.stdout
    assert inputs[279] - inputs[16] == pytest.approx(279 - 16, abs=5), "questions differ by a few tokens"


@pytest.mark.engine
@pytest.mark.verify
def test_both_servers_are_loaded_and_compared(tmp_path: Path) -> None:
    arguments = ["--size", "tiny", "--rounds", "2", "--seconds", "3", "--users", "2", "--out", str(tmp_path)]
    done = run_module("loadtests.compare", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {arm: json.loads((tmp_path / f"result-{arm}.json").read_text()) for arm in ARMS}
    for arm, kept in ((STOCK, None), (OFF, 1.0)):
        assert results[arm]["failed"] == 0
        assert results[arm]["vtprune"]["keep_ratio"] == kept
        assert results[arm]["vtprune"]["kinds"]["FreshImages"]["mean_input_tokens"] > 576
    assert 0 < results[PRUNED]["vtprune"]["keep_ratio"] < 1
    first = [json.loads((tmp_path / f"round-1-{arm}" / "requests.jsonl").read_text().split("\n")[0]) for arm in ARMS]
    assert first[0]["input_tokens"] == first[1]["input_tokens"], "the same questions, all visual tokens"
    assert "balanced / stock, median TTFT: " in done.stdout
    assert "CPU time of the API process: " in done.stdout

"""Options mean what they say, and mistakes in them are named."""

import argparse

import pytest

from loadtests.options import add_slo_arguments, p99_limits, policy


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loadtest")
    add_slo_arguments(parser)
    return parser.parse_args(arguments)


def test_limits_from_the_command_line() -> None:
    options = parsed("--slo-ttft-p99-ms", "300", "--slo-itl-p99-ms", "2.5", "--goodput", "ttft:500 tpot:50")
    assert p99_limits(options) == {"ttft": 300.0, "itl": 2.5}
    assert options.goodput == {"ttft": 500.0, "tpot": 50.0}
    assert (p99_limits(parsed()), parsed().goodput) == ({}, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--slo-ttft-p99-ms", "fast"],
            "argument --slo-ttft-p99-ms: 'fast' is not accepted; expected a number above 0",
        ),
        (["--slo-ttft-p99-ms", "0"], "'0' is not accepted"),
        (["--slo-e2el-p99-ms", "-3"], "'-3' is not accepted"),
        (["--slo-tpot-p99-ms", "nan"], "'nan' is not accepted"),
        (["--slo-tpot-p99-ms", "inf"], "'inf' is not accepted"),
        (["--goodput", "itl:5"], "argument --goodput: 'itl:5': expected METRIC:MS with one of ttft, tpot, e2el"),
        (["--goodput", "ttft"], "'' is not accepted"),
        (["--goodput", " "], "no limit: expected METRIC:MS"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        parsed(*arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "meant"),
    [("balanced", "balanced"), ("false", False), ('{"method": "uniform"}', {"method": "uniform"}), ('"fast"', "fast")],
)
def test_a_policy_is_json_or_a_preset(text: str, meant: object) -> None:
    assert policy(text) == meant

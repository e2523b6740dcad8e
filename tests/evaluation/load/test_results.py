"""Results are computed from raw samples, under the names of ``vllm bench serve``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_chat import report
from vllm_vtprune_evaluation.load.records import Record, load_records, save_records
from vllm_vtprune_evaluation.load.results import broken, is_good, kinds, peaks, percentile, result, samples, span

# What `vllm bench serve` 0.32 writes with --save-detailed, without `rtfx` (audio), `queue_times` and `burstiness` (of
# its own pacing) and `tokenizer_id` (here the server counts the tokens).
THEIR_KEYS = """
date endpoint_type backend label model_id num_prompts request_rate max_concurrency duration completed failed
total_input_tokens total_output_tokens request_throughput request_goodput output_throughput total_token_throughput
input_lens output_lens ttfts itls latencies start_times generated_texts errors max_output_tokens_per_s
max_concurrent_requests
""".split()


def record(start: float = 0.0, *, kind: str = "kind", error: str | None = None, **fields: Any) -> Record:
    """A request of a second: first token after 0.2 s, three more 0.1 s apart, over after 1 s."""
    measured = {"ttft": 0.2, "itls": (0.1, 0.1, 0.1), "e2e": 0.8, "input_tokens": 50, "output_tokens": 4}
    return Record(kind, start, elapsed=1.0, error=error, **{**measured, **fields})


def failed(start: float = 0.0, error: str = "ReadTimeout: ") -> Record:
    return Record("kind", start, elapsed=1.0, error=error)


def of(records: Sequence[Record], **options: Any) -> dict[str, Any]:
    return result(records, model="m", label="l", users=3, **options)


def test_percentiles_fall_between_samples() -> None:
    assert percentile([10.0, 20.0], 50) == 15.0
    assert percentile([float(value) for value in range(1, 101)], 99) == pytest.approx(99.01)
    assert percentile([147.0], 99) == 147.0
    assert percentile([], 99) is None


def test_keys_are_those_of_vllm() -> None:
    summary = of([record()])
    assert set(THEIR_KEYS) <= set(summary)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p99"):
            assert isinstance(summary[f"{statistic}_{metric}_ms"], float)
    rest = {key for key in summary if key not in THEIR_KEYS and not key.endswith("_ms")}
    assert rest == {"vtprune"}, "what is ours has a name space"
    assert json.loads(json.dumps(summary)) == summary


def test_sums_and_rates() -> None:
    summary = of([record(100.0), record(101.0), failed(103.0)])
    assert (summary["completed"], summary["failed"], summary["num_prompts"]) == (2, 1, 3)
    assert summary["duration"] == 4.0, "from the first start to the last end, that of the failed one"
    assert summary["request_throughput"] == 0.5
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (100, 8)
    assert summary["output_throughput"] == 2.0
    assert summary["total_token_throughput"] == 27.0
    assert summary["request_rate"] == "inf"
    assert summary["errors"] == ["", "", "ReadTimeout: "]
    assert summary["vtprune"]["errors"] == {"ReadTimeout: ": 1}
    assert summary["vtprune"]["achieved_rate"] is None, "users asked as they liked"


def test_what_was_due_and_what_was_sent() -> None:
    unsent = Record("unsent", 104.0, elapsed=1.0, error="not sent", lag=None)
    summary = of(
        [record(100.0), record(101.0, lag=0.05), record(102.0, lag=1.0, stall=0.3), unsent], rate=1.0, arrivals="even"
    )
    pacing = summary["vtprune"]
    assert (pacing["offered_rate"], pacing["arrivals"]) == (1.0, "even")
    assert pacing["achieved_rate"] == pytest.approx(2 / 3), "the third was sent three seconds after the first was due"
    assert (pacing["punctual"], pacing["unsent"], summary["failed"]) == (0.5, 1, 1)
    assert (pacing["median_lag_ms"], pacing["max_lag_ms"]) == (pytest.approx(50), 1000)
    assert pacing["max_stall_ms"] == 300


def test_milliseconds_of_a_request() -> None:
    summary = of([record()])
    assert summary["mean_ttft_ms"] == pytest.approx(200)
    assert summary["mean_tpot_ms"] == pytest.approx(200), "(800 - 200) / 3"
    assert summary["mean_itl_ms"] == pytest.approx(100)
    assert summary["p99_e2el_ms"] == pytest.approx(800)


def test_gaps_of_all_requests_count_alike() -> None:
    latencies = samples([record(itls=(0.1, 0.1, 0.1)), record(itls=(0.5,))])
    assert latencies["itl"] == pytest.approx([100, 100, 100, 500])


def test_failed_requests_are_in_no_percentile() -> None:
    assert samples([record(), record(error="cut", ttft=9.0)])["ttft"] == pytest.approx([200])


def test_what_was_not_measured_is_none_and_not_zero() -> None:
    summary = of(
        [record(ttft=None, itls=(), output_tokens=None, input_tokens=None), record(start=1.0, ttft=None, itls=())]
    )
    assert summary["mean_ttft_ms"] is None
    assert summary["p99_itl_ms"] is None
    assert summary["request_goodput"] is None
    assert summary["vtprune"]["without_content"] == 2
    assert summary["vtprune"]["without_usage"] == 1
    assert summary["vtprune"]["keep_ratio"] is None


def test_of_no_request() -> None:
    summary = of([])
    assert (summary["completed"], summary["duration"], summary["request_throughput"]) == (0, 0.0, 0.0)
    assert summary["p99_ttft_ms"] is None
    assert (span([]), peaks([])) == (0.0, (0.0, 0))


def test_goodput_counts_requests_within_all_limits() -> None:
    records = [record(0.0), record(1.0, ttft=0.4), record(2.0, e2e=3.0), failed(3.0)]
    summary = of(records, goodput={"ttft": 300.0, "e2el": 1000.0})
    assert summary["duration"] == 4.0
    assert summary["request_goodput"] == 0.25
    assert of(records, goodput={"ttft": 500.0})["request_goodput"] == 0.75


@pytest.mark.parametrize(
    ("sample", "limits", "good"),
    [
        (record(), {"ttft": 200.0}, True),
        (record(), {"ttft": 199.0}, False),
        (record(ttft=None), {"ttft": 1e9}, False),
        (record(output_tokens=1), {"tpot": 0.001}, True),
        (record(output_tokens=None), {"tpot": 1e9}, False),
        (record(error="cut"), {"e2el": 1e9}, False),
    ],
)
def test_a_good_request(sample: Record, limits: dict[str, float], good: bool) -> None:
    assert is_good(sample, limits) is good


def test_peaks_are_within_a_second() -> None:
    overlap = record(10.5, ttft=0.25, itls=(0.1, 0.1, 0.1), e2e=0.8)  # chunks at 10.75, 10.85, 10.95, 11.05
    assert peaks([record(10.0), overlap, record(13.0)]) == (7.0, 2)
    assert peaks([record(10.0), record(11.0)])[1] == 1, "one begins when the other ends"


def test_kinds_are_told_apart() -> None:
    by_kind = kinds(
        [record(kind="a", pruning=report(144)), record(kind="a", pruning=report(288)), record(kind="b", ttft=0.6)]
    )
    assert by_kind["a"]["requests"] == 2
    assert by_kind["a"]["keep_ratio"] == pytest.approx(0.375)
    assert by_kind["b"]["keep_ratio"] is None
    assert by_kind["b"]["median_ttft_ms"] == pytest.approx(600)


def test_records_survive_a_file(tmp_path: Path) -> None:
    records = [record(text="naïve\u2028 猫\n\x85", pruning=report(3)), failed()]
    save_records(tmp_path / "records", records)
    assert load_records(tmp_path / "records") == records


# --- promises ---------------------------------------------------------------------------------------------------------


def test_promises_that_hold() -> None:
    assert broken([record(), record()], {"ttft": 200.0, "tpot": 200.1, "itl": 100.1, "e2el": 800.0}) == []


def test_a_percentile_above_its_limit() -> None:
    assert broken([record()], {"ttft": 150.0, "e2el": 900.0}) == ["ttft p99 was to be 150 ms at most, and is 200.0 ms"]


def test_a_failed_request_is_a_broken_promise_without_any_limit() -> None:
    assert broken([record(), failed(), failed()], {}) == ["2 of 3 requests failed: ReadTimeout: "]


def test_a_kind_of_request_of_which_nothing_was_pruned() -> None:
    records = [record(kind="b", pruning=report(576)), record(kind="a"), record(kind="c", pruning=report(575)), failed()]
    assert broken(records[:3], {}, "fast") == ["a: nothing was pruned", "b: nothing was pruned"]
    assert broken(records[2:], {}, "fast") == ["1 of 2 requests failed: ReadTimeout: "]
    assert broken(records[:3], {}, "off") == broken(records[:3], {}, False) == broken(records[:3], {}) == []


def test_nothing_measured_holds_no_promise() -> None:
    assert broken([], {}) == ["no request was finished"]
    assert broken([record(ttft=None)], {"ttft": 150.0}) == ["ttft p99 was to be 150 ms at most, and was not measured"]

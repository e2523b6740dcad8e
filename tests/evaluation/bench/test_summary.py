"""The statistics of a benchmark."""

from typing import Any

import pytest

from tests.support.fake_chat import report
from vllm_vtprune_evaluation.bench.report import sentences
from vllm_vtprune_evaluation.bench.rounds import OFF, Arm, Level, Measured
from vllm_vtprune_evaluation.bench.subjects import Subject
from vllm_vtprune_evaluation.bench.summary import complaints, plan_share, qualities, similarity, speeds
from vllm_vtprune_evaluation.load.records import Record

ONE_CLIENT, FOUR_CLIENTS = Level(1), Level(4)


def record(start: float = 0.0, ttft: float = 0.2, text: str = "red", kept: int = 576, **fields: Any) -> Record:
    measured = {"ttft": ttft, "e2e": 2 * ttft, "output_tokens": 4, "pruning": report(kept)}
    return Record("kind", start, elapsed=2 * ttft, text=text, **{**measured, **fields})


def block(ttft: float, requests: int, **fields: Any) -> list[Record]:
    """Requests that end one after the other."""
    return [record(2 * ttft * index, ttft, **fields) for index in range(requests)]


def test_ratios_are_paired_by_round() -> None:
    """The machine becomes four times slower; the arm stays twice as fast as `off` beside it."""
    times = [0.1, 0.2, 0.3, 0.4]
    measured = Measured(
        rounds={
            FOUR_CLIENTS: {OFF: [block(2 * t, 8) for t in times], "fast": [block(t, 8, kept=64) for t in times]},
        }
    )
    off, fast = speeds(measured)
    assert (off.ttft_ratio, off.throughput_ratio) == (None, None)
    assert fast.ttft_ratio is not None
    assert fast.throughput_ratio is not None
    assert (fast.ttft_ratio.low, fast.ttft_ratio.high) == pytest.approx((0.5, 0.5))
    assert fast.throughput_ratio.value == pytest.approx(2)
    assert fast.requests == 32
    assert off.ttft_p50 == pytest.approx(500)
    assert fast.requests_per_second == pytest.approx(32 / (8 * 2 * sum(times)))
    assert fast.tokens_per_second == pytest.approx(4 * fast.requests_per_second)


@pytest.mark.parametrize(
    ("factors", "phrase"), [([2.0] * 4, "takes 2.00 ["), ([0.5, 2.0, 0.7, 1.2], "no difference in ")]
)
def test_a_ratio_whose_interval_holds_1_shows_no_difference(factors: list[float], phrase: str) -> None:
    rounds = {OFF: [block(0.2, 1)] * 4, "fast": [block(0.2 * factor, 1, kept=64) for factor in factors]}
    answers = {OFF: [record()], "fast": [record(kept=64)]}
    measured = Measured(answers=answers, again=[record()], rounds={ONE_CLIENT: rounds})
    [sentence] = sentences(speeds(measured), qualities(measured, [Subject("a", b"", "", "What?")]))
    assert phrase in sentence
    assert ("shown with 1 client" in sentence) == phrase.startswith("no difference")


def test_a_round_that_failed_has_no_ratio_and_the_others_count() -> None:
    failed = [record(error="cut", ttft=0.0)]
    measured = Measured(rounds={ONE_CLIENT: {OFF: [block(0.2, 1)] * 3, "fast": [block(0.1, 1), failed, block(0.1, 1)]}})
    _, fast = speeds(measured)
    assert fast.requests == 2
    assert fast.ttft_ratio is not None
    assert fast.ttft_ratio.pairs == 2
    assert complaints([Arm(OFF, False), Arm("fast", "fast")], measured) == [
        "fast, 1 client: 1 of 3 requests failed: cut", "fast, 1 client: nothing was pruned",
    ]  # fmt: skip


def test_answers_are_compared_with_the_unpruned_ones() -> None:
    subjects = [Subject(str(index), b"", "", "What?", "red") for index in range(4)]
    answers = {
        OFF: [record(text=text) for text in ("red", "red", "blue", "a red car")],
        "fast": [record(text=text, kept=64) for text in ("Red.", "blue", "blue", "a blue car")],
    }
    again = [record(text=text) for text in ("red", "red", "blue", "two")]
    off, fast = qualities(Measured(answers=answers, again=again), subjects)
    assert (off.same, off.right, off.share) == (3 / 4, 1 / 2, 1)
    assert (fast.same, fast.right, fast.first_word) == (1 / 2, 1 / 4, 3 / 4)
    assert fast.similarity == pytest.approx((1 + 0 + 1 + 2 / 3) / 4)
    assert fast.share == pytest.approx(64 / 576)
    assert fast.same_ci95 == pytest.approx((0.150, 0.850), abs=0.001), "Wilson's interval of 2 in 4"


def test_failed_answers_and_unknown_ones_do_not_count() -> None:
    subjects = [Subject("a", b"", "", "What?")] * 2
    answers = {OFF: [record(), record()], "fast": [record(error="cut", text=""), record(kept=64)]}
    _, fast = qualities(Measured(answers=answers, again=[record(), record()]), subjects)
    assert (fast.questions, fast.same, fast.right) == (1, 1.0, None)


def test_similarity_is_that_of_the_words() -> None:
    assert similarity("The red car.", "the red car") == 1
    assert similarity("the red car", "the blue car") == pytest.approx(2 / 3)
    assert similarity("", "") == 1
    assert similarity("red", "") == 0


def test_the_plan_s_share_of_the_time_to_first_token() -> None:
    timings = {"text": 1.0, "encode": 50.0, "budget": 2.0, "select": 3.0, "ttft": 60.0}
    assert plan_share(record(pruning={"images": [], "timings_ms": timings})) == pytest.approx(0.1)
    assert plan_share(record(pruning={"images": [], "timings_ms": {**timings, "select": None}})) is None
    assert plan_share(record(pruning=None)) is None

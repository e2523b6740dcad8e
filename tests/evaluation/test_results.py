"""From answers to tables: what is counted, on which questions, and how sure it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.defaults import QWEN
from tests.support.energy import energy_rank
from vllm_vtprune.budget import exact_spectrum
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import LLAVA, PolicyError
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune_evaluation.ablations import ABLATIONS, solver_arms
from vllm_vtprune_evaluation.answers import Answer, Answers, AnswersError, subject
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm, check, energy, grid, own_counts, presets, usable
from vllm_vtprune_evaluation.questions import Picture, is_right, pictures
from vllm_vtprune_evaluation.report import accuracy_table, budget_table, difference_table, plot_budgets, split_table
from vllm_vtprune_evaluation.results import (
    adaptive_against_fixed,
    against_reference,
    comparable,
    differences,
    mean_ranks,
    ranked_kinds,
    reference_row,
    results,
)
from vllm_vtprune_evaluation.thresholds import Measured, mean_kept, threshold_for

ARM = Arm("random@64", {"method": "random", "budget": {"type": "tokens", "keep": 64}}, "random", 64)
FEATURES = VisualFeatures(torch.randn(576, 48), torch.randn(576, 32), grid=(24, 24))


def answered(right: list[bool], kind: str = "count", tokens: float = 64) -> dict[str, Answer]:
    """Two questions a picture."""
    names = [f"{index // 2}#{index % 2}" for index in range(len(right))]
    return {name: Answer(name, kind, "dense", "3", hit, tokens) for name, hit in zip(names, right, strict=True)}


# --- questions ------------------------------------------------------------------------------------------------------


def test_as_many_questions_as_wanted_and_always_the_same() -> None:
    asked = list(pictures("test", 40))
    assert sum(len(picture.questions) for picture in asked) == 40
    assert asked == list(pictures("test", 40))
    longer = list(pictures("test", 60))
    assert longer[: len(asked) - 1] == asked[:-1], "a longer test begins with a shorter one"
    cut, whole = asked[-1].questions, longer[len(asked) - 1].questions
    assert whole[: len(cut)] == cut
    assert {picture.source.split for picture in asked} == {"test"}
    assert len({picture.name(index) for picture in asked for index in range(len(picture.questions))}) == 40


@pytest.mark.parametrize("answer", ["left", " Left", "left.", "LEFT. "])
def test_case_spaces_and_a_full_stop_do_not_matter(answer: str) -> None:
    assert is_right(answer, "left")


@pytest.mark.parametrize("answer", ["", "left right", "leftmost", "top left"])
def test_anything_else_is_wrong(answer: str) -> None:
    assert not is_right(answer, "left")


# --- ways of pruning ------------------------------------------------------------------------------------------------


def test_every_method_at_every_budget_that_it_can_reach() -> None:
    arms = grid(METHODS, [128, 64], {64: 0.9}, FEATURES)
    check([UNPRUNED, *arms, *own_counts(METHODS), *presets(["fast", "balanced"])])
    rows = {(arm.method, arm.adaptive, arm.keep) for arm in arms}
    assert ("resprune", False, 128) in rows
    assert ("resprune", True, 64) in rows
    assert ("resprune", True, 128) not in rows, "no threshold is known"
    assert ("random3x3", False, 64) in rows
    assert ("random3x3", False, 128) not in rows, "a 24 x 24 grid has 64 cells of 3 x 3"
    assert ("resize", False, 64) in rows
    assert ("resize", True, 64) not in rows, "energy is of features, which it does not see"
    assert {arm.method for arm in arms} == set(METHODS)
    assert [arm.name for arm in own_counts(METHODS)] == ["prumerge@own", "trim@own"]


def test_methods_that_need_what_a_model_does_not_have_are_left_out() -> None:
    assert usable(METHODS, LLAVA) == [method for method in METHODS if method != "resize"]
    assert usable(["fastervlm", "resize", "uniform"], QWEN) == ["resize", "uniform"]


def test_every_row_of_the_papers_tables_is_a_policy() -> None:
    for ablation in ABLATIONS.values():
        arms = ablation.arms()
        check(arms)
        assert len({arm.digest() for arm in arms}) == len(arms), "each row changes something"
    arms = solver_arms(0.9, 64, dimension=192)
    check(arms)
    assert [arm.name for arm in arms[:2]] == ["exact", "rSVD, 94 of 192, q = 2"]


def test_a_policy_that_is_none_and_a_name_given_twice_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"mine\.budget\.keep"):
        check([Arm("mine", {"budget": {"type": "tokens", "keep": 0}}, "mine")])
    with pytest.raises(ValueError, match="name of its own"):
        check([ARM, ARM])


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_gone_on_with_where_a_run_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file, {"model": "a"}) as answers:
        for answer in answered([True, False]).values():
            answers.add(ARM, answer)
    file.write_text(file.read_text()[:-20])  # killed while it wrote
    with Answers(file, {"model": "a"}) as answers:
        assert dict(answers.of(ARM)) == answered([True])
        assert answers.has(ARM, "0#0")
        assert not answers.has(ARM, "0#1")
        answers.add(ARM, answered([True, False])["0#1"])
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3
    with Answers(file, {"model": "a"}) as answers:
        assert len(answers.of(ARM)) == 2


def test_a_file_that_was_written_by_two_runs_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file, {"model": "a"}) as answers:
        for answer in answered([True, False]).values():
            answers.add(ARM, answer)
    first, second, third = file.read_text().splitlines()
    file.write_text(f"{first}\n{second[:30]}\n{third}\n")
    before = file.read_text()
    with pytest.raises(AnswersError, match=":2: is not JSON"):
        Answers(file, {"model": "a"})
    assert file.read_text() == before, "nothing is lost"


def test_answers_of_another_model_or_policy_are_not_mixed_in(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with Answers(file, {"model": "a"}) as answers:
        answers.add(ARM, answered([True])["0#0"])
    other = Arm(ARM.name, {"method": "random", "budget": {"type": "tokens", "keep": 64}, "seed": 1}, "random", 64)
    with Answers(file, {"model": "a"}) as answers:
        assert not answers.has(other, "0#0")
    with pytest.raises(AnswersError, match="another folder"):
        Answers(file, {"model": "b"})


def test_what_answers_depend_on_is_told_apart(tmp_path: Path) -> None:
    """The arithmetic, the pictures of a user's, and the code that makes or asks."""
    scenes, more = list(pictures("test", 3)), list(pictures("test", 9))
    assert subject("m", "float32", scenes) == subject("m", "float32", more), "so that more can be asked later"
    assert subject("m", "float32", scenes) != subject("m", "http://localhost:8000", scenes)
    file = tmp_path / "one.png"
    scenes[0].paint().save(file)
    [own] = [Picture("one.png", file, scenes[0].questions)]
    before = subject("m", "auto", [own])
    more[1].paint().save(file)
    assert subject("m", "auto", [own]) != before


def test_what_is_random_is_drawn_anew_for_each_picture() -> None:
    assert ARM.policy_for("1") != ARM.policy_for("2")
    assert ARM.policy_for("1") == ARM.policy_for("1")
    scope = Arm("scope@64", {"method": "scope", "budget": {"type": "tokens", "keep": 64}}, "scope", 64)
    assert scope.policy_for("1") == scope.policy
    assert UNPRUNED.policy_for("1") is False


# --- accuracy -------------------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_the_questions_that_everybody_was_asked() -> None:
    unpruned, pruned = answered([True] * 8, tokens=576), answered([True, False] * 4)
    del pruned["3#1"]
    [base, result] = results([(UNPRUNED, unpruned), (ARM, pruned)], unpruned)
    assert (base.questions, base.accuracy, base.difference, base.mean_tokens) == (7, 1.0, 0.0, 576)
    assert result.accuracy == pytest.approx(4 / 7)
    assert result.difference == pytest.approx(-3 / 7)
    assert result.retained == pytest.approx(4 / 7)
    assert result.budget == {"type": "tokens", "keep": 64}
    assert base.difference_ci95 == (0.0, 0.0)


def test_the_interval_resamples_pictures_not_questions() -> None:
    """Twice as many questions about the same pictures, answered alike, tell no more."""
    right = list(np.random.default_rng(0).random(60) < 0.7)
    once = {f"{index}#0": Answer(f"{index}#0", "count", "dense", "", bool(hit), 64) for index, hit in enumerate(right)}
    twice = once | {
        f"{index}#1": Answer(f"{index}#1", "count", "dense", "", bool(hit), 64) for index, hit in enumerate(right)
    }
    [single], [double] = (results([(ARM, asked)], asked) for asked in (once, twice))
    assert single.ci95 == pytest.approx(double.ci95)
    share = float(np.mean(right))
    error = 1.96 * (share * (1 - share) / 60) ** 0.5
    assert single.ci95 == pytest.approx((share - error, share + error), abs=0.03)


def test_kinds_that_the_model_does_not_know_do_not_rank() -> None:
    unpruned = answered([True] * 4) | {
        f"9{i}#0": Answer(f"9{i}#0", "reading", "dense", "", i == 0, 576) for i in range(4)
    }
    assert ranked_kinds(unpruned.values()) == ["count"]
    [result] = results([(ARM, unpruned)], unpruned, ["count"])
    assert (result.questions, result.accuracy) == (4, 1.0)
    assert set(result.by_kind) == {"count"}


def test_tables_and_the_plot_of_budgets_show_every_arm(tmp_path: Path) -> None:
    unpruned = answered([True] * 8, tokens=576)
    arms = [ARM, Arm("random+E@64", {"budget": energy(0.9)}, "random", 64, True)]
    outcomes = results([(UNPRUNED, unpruned), *((arm, answered([True, False] * 4)) for arm in arms)], unpruned)
    assert "| random@64 | 64.0 | 50.0 % |" in accuracy_table(outcomes)
    assert "| `random+E` | 50.0 % (-50.0, 64 tokens) |" in budget_table(outcomes[1:])
    assert "| random@64 | 50.0 % |" in split_table(outcomes, "kind")
    plot_budgets({64: {"sparse": [32.0, 40.0], "dense": [90.0]}, 128: {"dense": [128.0]}}, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").stat().st_size > 10_000


# --- comparisons ----------------------------------------------------------------------------------------------------


def arm(method: str, keep: int, *, adaptive: bool = False, inside: bool = False) -> Arm:
    name = f"{method}{'+E' if adaptive else ''}@{keep}"
    return Arm(name, {"method": name}, method, keep, adaptive, inside)


def answers_from(*rights: tuple[Arm, str]) -> list[tuple[Arm, dict[str, Answer]]]:
    """Answers from strings such as "101 01": right or wrong, by question, a word for each picture."""
    return [
        (
            arm,
            {
                f"{picture}#{index}": Answer(f"{picture}#{index}", "count", "dense", "", mark == "1", arm.keep or 576)
                for picture, word in enumerate(right.split())
                for index, mark in enumerate(word)
            },
        )
        for arm, right in rights
    ]


def test_a_paired_difference_and_its_interval_are_those_of_the_pictures() -> None:
    """Of two pictures one is answered better: two drawn again differ by 0 or 1 on average once in four times each."""
    answers = answers_from(
        (UNPRUNED, "1 1"), (arm("resprune", 64), "1 1"), (arm("scope", 64), "1 0"), (arm("dart", 64), "0 1")
    )
    outcomes = results(answers, answers[0][1])
    scope, dart = differences(against_reference(outcomes[1:]), answers, answers[0][1])
    assert (scope.arm, scope.less, scope.row, scope.keep) == ("resprune@64", "scope@64", "scope", 64)
    assert (scope.difference, scope.ci95) == (0.5, (0.0, 1.0))
    assert (dart.difference, dart.ci95) == (0.5, (0.0, 1.0))
    [turned] = differences([(outcomes[2], outcomes[3])], answers, answers[0][1])
    assert (turned.difference, turned.ci95) == (0.0, (-1.0, 1.0)), "as accurate, but not on the same questions"


def test_a_difference_from_the_unpruned_model_is_that_of_the_result() -> None:
    draw = np.random.default_rng(1)
    often, seldom = (" ".join("".join(map(str, row)) for row in draw.binomial(1, p, (20, 3))) for p in (0.9, 0.6))
    answers = answers_from((UNPRUNED, often), (arm("resprune", 64), seldom))
    unpruned, pruned = results(answers, answers[0][1])
    [difference] = differences([(pruned, unpruned)], answers, answers[0][1])
    assert difference.difference == pytest.approx(pruned.difference)
    assert difference.ci95 == pytest.approx(pruned.difference_ci95)


def test_only_the_kinds_that_rank_count() -> None:
    answers = answers_from((UNPRUNED, "1 1"), (arm("resprune", 64), "1 1"), (arm("scope", 64), "1 0"))
    for _, asked in answers:
        asked["1#0"] = Answer("1#0", "reading", "dense", "", asked["1#0"].right, 64)
    outcomes = results(answers, answers[0][1], ["count"])
    [scope] = differences(against_reference(outcomes[1:]), answers, answers[0][1], ["count"])
    assert scope.difference == 0


RUN = [
    (UNPRUNED, "1 1 1 1"),
    (arm("scope", 128), "1 1 1 1"),
    (arm("scope", 64), "1 1 1 0"),
    (arm("resprune", 128), "1 1 1 0"),
    (arm("resprune", 64), "1 1 0 0"),
    (arm("resprune", 64, adaptive=True), "1 1 1 0"),
    (arm("dart", 128), "1 1 1 0"),
    (arm("dart", 64), "0 0 0 0"),
    (arm("dart", 64, adaptive=True), "0 0 1 0"),
    (arm("skip", 64), "1 0 0 0"),
    (arm("fastv", 64, inside=True), "1 1 1 1"),
]


def test_each_other_way_at_the_same_budget_is_compared_and_those_inside_the_language_model_are_not() -> None:
    answers = answers_from(*RUN)
    outcomes = results(answers, answers[0][1])
    ways = comparable(outcomes)
    assert mean_ranks(ways) == {"scope": 1, "resprune": 2.25, "skip": 3, "dart": 3.25}, "2.5 where two share it"
    assert reference_row(ways) == "resprune"
    pairs = differences(against_reference(ways), answers, answers[0][1])
    assert [(pair.arm, pair.less) for pair in pairs] == [
        ("resprune@128", "scope@128"),
        ("resprune@64", "scope@64"),
        ("resprune@64", "skip@64"),
        ("resprune@128", "dart@128"),
        ("resprune@64", "dart@64"),
    ]
    rows = [line.split("|")[1:-1] for line in difference_table(pairs).splitlines()]
    assert [[cell.strip() for cell in row][:2] for row in rows] == [
        ["", "128 tokens"],
        ["---", "--:"],
        ["`scope`", "-25.0 (-75.0 to +0.0)"],
        ["`skip`", ""],
        ["`dart`", "+0.0 (+0.0 to +0.0)"],
    ]


def test_without_the_default_method_the_first_is_compared_with_the_others() -> None:
    answers = answers_from(*(pair for pair in RUN if pair[0].method != "resprune"))
    assert reference_row(comparable(results(answers, answers[0][1]))) == "scope"
    assert against_reference([]) == []


def test_where_nothing_has_a_fixed_budget_the_adaptive_ones_are_compared() -> None:
    answers = answers_from(*(pair for pair in RUN if pair[0].adaptive or pair[0] is UNPRUNED))
    ways = comparable(results(answers, answers[0][1]))
    assert [(result.arm, other.arm) for result, other in against_reference(ways)] == [("resprune+E@64", "dart+E@64")]


def test_what_an_adaptive_budget_adds_is_told_with_its_interval() -> None:
    answers = answers_from(*RUN)
    pairs = adaptive_against_fixed(results(answers, answers[0][1]))
    gains = differences(pairs, answers, answers[0][1])
    assert [(gain.arm, gain.less, gain.difference) for gain in gains] == [
        ("resprune+E@64", "resprune@64", 0.25),
        ("dart+E@64", "dart@64", 0.25),
    ]
    assert "| `resprune` | +25.0 (+0.0 to +75.0) |" in difference_table(gains)


def test_an_interval_without_0_is_bold() -> None:
    answers = answers_from((UNPRUNED, "1 1"), (arm("resprune", 64), "1 1"), (arm("dart", 64), "0 0"))
    pairs = against_reference(results(answers, answers[0][1])[1:])
    table = difference_table(differences(pairs, answers, answers[0][1]))
    assert "| `dart` | **+100.0 (+100.0 to +100.0)** |" in table


# --- thresholds -----------------------------------------------------------------------------------------------------


def test_a_threshold_keeps_the_mean_that_it_was_found_for() -> None:
    generator = torch.Generator().manual_seed(0)
    decays = torch.logspace(-1.5, 0.3, 12)
    pictures_ = [torch.randn(200, 40, generator=generator) * torch.arange(1, 41).float() ** -decay for decay in decays]
    weights = [1 + index % 3 for index in range(len(pictures_))]
    measured = [
        Measured(exact_spectrum(picture), 200, 200, weight) for picture, weight in zip(pictures_, weights, strict=True)
    ]
    threshold = threshold_for(measured, 20)
    assert threshold is not None
    kept = [energy_rank(picture, threshold, "exact") for picture in pictures_]
    assert [picture.kept(threshold) for picture in measured] == kept
    assert np.average(kept, weights=weights) == pytest.approx(20, abs=0.5)
    assert mean_kept(measured, threshold) == pytest.approx(np.average(kept, weights=weights))
    assert max(kept) > 1.3 * min(kept), "it should follow the pictures"
    assert threshold_for(measured, 41) is None, "the features have 40 dimensions"


def test_a_picture_in_tiles_keeps_the_overview_s_share_of_all_its_tokens() -> None:
    features = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    spectrum = exact_spectrum(features)
    whole, tiled = Measured(spectrum, 100, 100), Measured(spectrum, 100, 500)
    assert tiled.kept(0.9) == 5 * whole.kept(0.9) == 5 * energy_rank(features, 0.9, "exact")

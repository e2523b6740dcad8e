"""From answers to accuracies with their intervals: by kind of question, by density, and against the unpruned model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_evaluation.answers import Answer
from vllm_vtprune_evaluation.arms import Arm
from vllm_vtprune_evaluation.questions import picture_of

DEFAULT_METHOD = PruningPolicy().method
RESAMPLES = 2000
RANKED_FROM = 0.85  # unpruned accuracy of a kind of question; below, it says little about pruning

Interval = tuple[float, float]
ByQuestion = Mapping[str, Answer]


@dataclass(frozen=True)
class Result:
    """An arm's accuracy on the questions that every arm was asked.

    Attributes:
        arm: its name.
        method: what it stands for in tables.
        budget: the policy's budget; None where it has none.
        keep: the tokens that it was meant to keep; None where nobody fixed them.
        adaptive: whether an energy budget decided.
        inside: whether it pruned inside the language model.
        questions: how many it was asked.
        mean_tokens: visual tokens, on average over questions.
        accuracy: share of right answers.
        ci95: its 95 % interval, from resampled pictures.
        difference: accuracy less that of the unpruned model, on the same questions.
        difference_ci95: the same way.
        retained: accuracy by that of the unpruned model; None where that is 0.
        by_kind: accuracy of each kind of question.
        by_density: accuracy in pictures of each density.
        tokens_by_density: mean visual tokens in pictures of each density.
    """

    arm: str
    method: str
    budget: Mapping[str, Any] | None
    keep: int | None
    adaptive: bool
    inside: bool
    questions: int
    mean_tokens: float
    accuracy: float
    ci95: Interval
    difference: float
    difference_ci95: Interval
    retained: float | None
    by_kind: Mapping[str, float]
    by_density: Mapping[str, float]
    tokens_by_density: Mapping[str, float]

    @property
    def row(self) -> str:
        """Its row in a table over budgets."""
        return f"{self.method}+E" if self.adaptive else self.method


@dataclass(frozen=True)
class Difference:
    """How much more accurate one arm is than another, on the questions that every arm was asked.

    Attributes:
        arm: its name.
        less: the name of the other.
        row: the other's row in a table over budgets.
        keep: the budget of both, in tokens.
        difference: accuracy of the one less that of the other.
        ci95: its 95 % interval, from resampled pictures.
    """

    arm: str
    less: str
    row: str
    keep: int | None
    difference: float
    ci95: Interval


def ranked_kinds(unpruned: Iterable[Answer]) -> list[str]:
    """The kinds of question that the unpruned model answers well enough to rank arms by."""
    return [kind for kind, share in accuracy_by(unpruned, "kind").items() if share >= RANKED_FROM]


def accuracy_by(answers: Iterable[Answer], field: str) -> dict[str, float]:
    """Shares of right answers by ``"kind"`` or ``"density"``, in alphabetical order."""
    return _means((getattr(answer, field), answer.right) for answer in answers)


def comparable(results: Iterable[Result]) -> list[Result]:
    """The results at fixed budgets; if there are none, those at energy budgets.

    Excludes methods inside the language model, whose first layers read more than the budget.
    """
    budgeted = [result for result in results if result.keep is not None and not result.inside]
    return [result for result in budgeted if not result.adaptive] or budgeted


def mean_ranks(results: Sequence[Result]) -> dict[str, float]:
    """Mean rank of each row over its budgets, best first. Rank 1 is the most accurate; ties get their mean rank."""
    ranks: dict[str, list[float]] = {}
    for result in results:
        others = [other.accuracy for other in results if other.keep == result.keep]
        better = sum(accuracy > result.accuracy for accuracy in others)
        ranks.setdefault(result.row, []).append(better + (others.count(result.accuracy) + 1) / 2)
    return dict(sorted(((row, fmean(of)) for row, of in ranks.items()), key=lambda item: item[1]))


def reference_row(results: Sequence[Result]) -> str:
    """The row that others are compared with: the default method's, else the first."""
    rows = [result.row for result in results]
    return DEFAULT_METHOD if DEFAULT_METHOD in rows else rows[0]


def against_reference(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Pairs of the reference and every other arm at the same budget, best row first."""
    if not results:
        return []
    row = reference_row(results)
    reference = {result.keep: result for result in results if result.row == row}
    ranks = mean_ranks(results)
    return [
        (reference[other.keep], other)
        for other in sorted(results, key=lambda result: ranks[result.row])
        if other.keep in reference and other is not reference[other.keep]
    ]


def adaptive_against_fixed(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Pairs of every "+E" and its method at the fixed budget, best method first."""
    fixed = [result for result in results if result.keep is not None and not result.adaptive]
    ranks = mean_ranks(fixed)
    adaptive = {(result.method, result.keep): result for result in results if result.adaptive}
    return [
        (adaptive[other.method, other.keep], other)
        for other in sorted(fixed, key=lambda result: ranks[result.row])
        if (other.method, other.keep) in adaptive
    ]


def results(
    arms: Sequence[tuple[Arm, ByQuestion]], unpruned: ByQuestion, kinds: Sequence[str] | None = None
) -> list[Result]:
    """The result of every arm, on the questions that all of them and the unpruned model were asked.

    Args:
        arms: with their answers.
        unpruned: the answers that nothing was pruned for.
        kinds: of question, that count; None for all.
    """
    names = _asked_of_all([answers for _, answers in arms], unpruned, kinds)
    base = np.array([unpruned[name].right for name in names], dtype=float)
    draws = picture_draws(names)
    out = []
    for arm, answers in arms:
        asked = [answers[name] for name in names]
        right = np.array([answer.right for answer in asked], dtype=float)
        budget = arm.policy.get("budget") if isinstance(arm.policy, Mapping) else None
        accuracy, before = _mean(right), _mean(base)
        out.append(
            Result(
                arm=arm.name,
                method=arm.method,
                budget=budget,
                keep=arm.keep,
                adaptive=arm.adaptive,
                inside=arm.inside,
                questions=len(names),
                mean_tokens=_mean(np.array([answer.tokens for answer in asked], dtype=float)),
                accuracy=accuracy,
                ci95=_interval(right, draws),
                difference=accuracy - before,
                difference_ci95=_interval(right - base, draws),
                retained=accuracy / before if before else None,
                by_kind=accuracy_by(asked, "kind"),
                by_density=accuracy_by(asked, "density"),
                tokens_by_density=_means((answer.density, answer.tokens) for answer in asked),
            )
        )
    return out


def differences(
    pairs: Iterable[tuple[Result, Result]],
    arms: Sequence[tuple[Arm, ByQuestion]],
    unpruned: ByQuestion,
    kinds: Sequence[str] | None = None,
) -> list[Difference]:
    """The accuracy of the first of each pair minus that of the second, with 95 % intervals.

    Args:
        pairs: pairs of results of `results` with the same arguments.
        arms: arms and their answers.
        unpruned: answers of the unpruned model.
        kinds: kinds of question to include; None: all.
    """
    names = _asked_of_all([answers for _, answers in arms], unpruned, kinds)
    right = {arm.name: np.array([answers[name].right for name in names], dtype=float) for arm, answers in arms}
    draws = picture_draws(names)
    out = []
    for first, second in pairs:
        gained = right[first.arm] - right[second.arm]
        interval = _interval(gained, draws)
        out.append(Difference(first.arm, second.arm, second.row, second.keep, _mean(gained), interval))
    return out


def _asked_of_all(answered: Iterable[ByQuestion], unpruned: ByQuestion, kinds: Sequence[str] | None) -> list[str]:
    common = set(unpruned).intersection(*answered)
    return sorted(name for name in common if kinds is None or unpruned[name].kind in kinds)


def picture_draws(names: Sequence[str]) -> NDArray[np.float64]:
    """(RESAMPLES, number of questions): how often each question is drawn when pictures are drawn with replacement.

    Questions about one picture share its difficulties, so they are drawn together.
    """
    pictures = sorted({picture_of(name) for name in names})
    column = {picture: index for index, picture in enumerate(pictures)}
    of = np.array([column[picture_of(name)] for name in names], dtype=int)
    generator = np.random.default_rng(0)
    times = generator.multinomial(len(pictures), np.full(len(pictures), 1 / max(1, len(pictures))), size=RESAMPLES)
    return times[:, of].astype(float)


def _interval(values: NDArray[np.float64], draws: NDArray[np.float64]) -> Interval:
    means = (draws @ values) / np.maximum(draws.sum(axis=1), 1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for name, value in pairs:
        sums.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in sorted(sums.items())}

"""Find a policy on a sample: methods by successive halving, then the smallest budget that retains enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from vllm_vtprune.policy import FamilyDefaults
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune_evaluation.answers import Answer
from vllm_vtprune_evaluation.questions import plain
from vllm_vtprune_evaluation.results import picture_draws

Item = TypeVar("Item")

RESPRUNE: tuple[Mapping[str, Any], ...] = ({}, {"alpha": 0}, {"alpha": 1.0}, {"gate": "clip"})
METHODS_TO_TRY = (
    *("resprune", "leverage", "cdpruner", "adaptprune", "scope", "divprune", "cover", "vispruner", "resize"),
)
"""The best of each kind in docs/evaluation.md, and resizing; those that a model cannot run are left out."""


@dataclass(frozen=True)
class Candidate:
    """A method with its parameters, without a budget.

    Attributes:
        name: in tables.
        fields: of the policy.
    """

    name: str
    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        return str(self.fields["method"])

    def policy(self, budget: Mapping[str, Any]) -> dict[str, Any]:
        """The policy with a budget."""
        return {**self.fields, "budget": dict(budget)}


def candidates(methods: Sequence[str], family: FamilyDefaults) -> list[Candidate]:
    """The methods that a family can run and that keep any number of tokens; resprune with several strengths of text."""
    out = []
    for method in methods:
        if METHODS[method].capped or not family.supports(METHODS[method]):
            continue
        for variant in RESPRUNE if method == "resprune" else ({},):
            parameters = ", ".join(f"{name} {value}" for name, value in variant.items())
            out.append(Candidate(f"{method}, {parameters}" if parameters else method, {"method": method, **variant}))
    return out


def sizes(pictures: int) -> list[int]:
    """The pictures of each rung of successive halving: an eighth, a quarter, a half, all."""
    return sorted({max(1, math.ceil(pictures / part)) for part in (8, 4, 2, 1)})


def survivors(items: int, rungs: int) -> list[int]:
    """How many are asked on each rung: all on the first, then the better half each time, at least two on the last."""
    return [max(min(2, items), math.ceil(items / 2**rung)) for rung in range(rungs)]


def halve(
    items: Sequence[Item], rungs: Sequence[int], scores: Callable[[Sequence[Item], int], Sequence[float]]
) -> list[Item]:
    """Successive halving: many items on few pictures, then the better half on more.

    Args:
        items: what to choose from; of equals, the first wins.
        rungs: pictures of each rung.
        scores: scores of items on the first so many pictures; more is better.

    Returns:
        The items of the last rung, best first.
    """
    left = list(items)
    for number, size in zip(survivors(len(items), len(rungs)), rungs, strict=True):
        left = left[:number]
        values = dict(zip(map(id, left), scores(left, size), strict=True))
        left = sorted(left, key=lambda item: -values[id(item)])
    return left


@dataclass(frozen=True)
class Retained:
    """How much of what the unpruned model answers is left.

    Attributes:
        share: right answers by those of the unpruned model; if they are not known, share of unchanged answers.
        ci95: 95 % interval, from resampled pictures.
        counted: right answers, or questions, of the unpruned model.
    """

    share: float
    ci95: tuple[float, float]
    counted: int

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % [{100 * self.ci95[0]:.1f}, {100 * self.ci95[1]:.1f}]"


def retained(answers: Sequence[Answer], unpruned: Sequence[Answer], *, known: bool) -> Retained:
    """What is retained.

    Args:
        answers: answers to some questions.
        unpruned: the unpruned model's answers, in the same order; at least one of them counts.
        known: whether the right answers are known.
    """
    if known:
        left, whole = [answer.right for answer in answers], [answer.right for answer in unpruned]
    else:
        left = [plain(answer.text) == plain(other.text) for answer, other in zip(answers, unpruned, strict=True)]
        whole = [True] * len(left)
    draws = picture_draws([answer.question for answer in unpruned])
    counted = draws @ np.array(whole, dtype=float)
    low, high = np.percentile((draws @ np.array(left, dtype=float))[counted > 0] / counted[counted > 0], [2.5, 97.5])
    return Retained(sum(left) / sum(whole), (float(low), float(high)), sum(whole))


@dataclass(frozen=True)
class Trial:
    """A budget that was tried.

    Attributes:
        budget: the budget.
        mean_tokens: tokens kept of a picture, on average over questions.
        retained: on the questions that the search may see.
    """

    budget: Mapping[str, Any]
    mean_tokens: float
    retained: Retained

    @property
    def kind(self) -> str:
        """The kind of the budget: "ratio" or "energy"."""
        return str(self.budget["type"])


def ladder(trials: Sequence[Trial], retain: float | None) -> list[Trial]:
    """The trials to take, the best first, then those to take if it does not hold on other pictures.

    Of each kind of budget, those count that retain enough together with all larger ones, so that no lucky small budget
    is taken. The fewest tokens are best; of as many tokens, what retains more; of equals, a ratio, which does not need
    the features.

    Args:
        trials: budgets that were tried.
        retain: share to retain; None: all have as many tokens, and what retains most is best.
    """
    if retain is None:
        return sorted(trials, key=lambda trial: (-trial.retained.share, trial.kind == "energy"))
    enough: list[Trial] = []
    for kind in ("ratio", "energy"):
        for trial in sorted((trial for trial in trials if trial.kind == kind), key=lambda trial: -trial.mean_tokens):
            if trial.retained.share < retain:
                break
            enough.append(trial)
    return sorted(enough, key=lambda trial: (round(trial.mean_tokens), -trial.retained.share, trial.kind == "energy"))

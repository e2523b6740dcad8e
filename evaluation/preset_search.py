"""Search a preset on a sample: ask about pictures under methods, then under budgets of the best one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import Picture
from vllm_vtprune_evaluation.search import Candidate, Retained, Trial, halve, ladder, retained, sizes, survivors
from vllm_vtprune_evaluation.spectra import Sample
from vllm_vtprune_evaluation.tables import percent, table
from vllm_vtprune_evaluation.thresholds import mean_kept, threshold_for

LARGEST = 0.9999  # largest threshold; above it, rounding decides
SHARES = (1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)  # keep ratios to try
COMPARED_AT = (1 / 4, 1 / 16)  # of them, those at which methods are compared
FLOOR = 1 / 2  # of the mean, that an energy budget keeps of every picture

Ask = Callable[[Sequence[Picture], Sequence[Arm], Callable[[int], object]], None]
"""Has pictures' questions answered under arms, and tells how many are."""


class NoPreset(Exception):
    """No preset can be found; the message gives the reason."""


@dataclass(frozen=True)
class ChosenPreset:
    """A policy, and what it keeps.

    Attributes:
        candidate: the method.
        trial: its budget.
        whole: visual tokens of a picture that is not pruned, on average over questions.
        checked: what it retains on the held-out pictures; None: none are held out.
    """

    candidate: Candidate
    trial: Trial
    whole: float
    checked: Retained | None

    def sentence(self, name: str) -> str:
        """What the preset keeps."""
        kept = (
            f"preset {name} ({self.candidate.name}, {_shown(self.trial.budget)}) keeps {self.trial.mean_tokens:.1f} of "
        )
        kept += f"{self.whole:.1f} tokens on average and retains "
        if self.checked is None:
            return f"{kept}{self.trial.retained} on the pictures that it was chosen by; none were held out."
        return f"{kept}{self.checked} on held-out pictures (n = {self.checked.counted})."

    def preset(self, name: str, model: str) -> str:
        """The presets file."""
        policy = self.candidate.policy(self.trial.budget)
        PruningPolicy.parse(policy)
        budget = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.trial.budget.items())
        fields = [f"{key} = {json.dumps(value)}" for key, value in self.candidate.fields.items()]
        about = f"# vtprune calibrate, {model}: {self.sentence(name)}"
        return "\n".join([about, f"[{json.dumps(name)}]", *fields, f"budget = {{{budget}}}", ""])


def _shown(budget: Mapping[str, Any]) -> str:
    if budget["type"] == "ratio":
        return f"ratio {budget['keep']:.4g}"
    return f"energy {budget['threshold']:.6g}, at least {budget['min_tokens']}"


@dataclass(eq=False)
class Search:
    """The search of a policy on a sample.

    Attributes:
        ask: has questions answered.
        answers: holds the answers.
        encoded: the searched pictures, as the encoder sees them.
        searched: pictures to choose by.
        held_out: pictures to check the choice on.
        known: whether the right answers are known.
    """

    ask: Ask
    answers: Answers
    encoded: Sample
    searched: Sequence[Picture]
    held_out: Sequence[Picture]
    known: bool = field(kw_only=True)
    _shares: list[float] = field(init=False, default_factory=list)  # at which methods are compared
    # method -> questions, and its share retained at each of these
    _compared: dict[str, tuple[int, list[float]]] = field(init=False, default_factory=dict)
    _progress: Progress = field(init=False)

    def run(self, tried: Sequence[Candidate], *, tokens: int | None, retain: float | None) -> ChosenPreset:
        """Find a policy: the one that retains most with ``tokens``, or the fewest tokens that retain ``retain``.

        Raises:
            NoPreset: the unpruned model has nothing to retain, or nothing retains enough.
        """
        whole = self.encoded.mean_tokens
        shares = [tokens / whole] if tokens else list(SHARES)
        rungs = sizes(len(self.searched)) if len(tried) > 1 else []
        self._shares = shares if tokens else list(COMPARED_AT)
        with Progress(desc="unpruned", total=self._total(tried, rungs, len(shares)), unit="answers") as progress:
            self._progress = progress
            self._answered([UNPRUNED], [*self.searched, *self.held_out])
            self._something_to_retain()
            best = tried[0]
            if rungs:
                best, *_ = halve(tried, rungs, lambda left, size: self._compare(left, size, rungs))
            trials = self._trials(best, shares, retain)
            chosen, checked = self._check(best, ladder(trials, retain), retain)
        self._print(best, trials, chosen)
        if chosen is None:
            where = "held-out pictures" if checked else "the searched pictures"
            raise NoPreset(f"nothing that was tried retains {retain:g} on {where}; the budgets are above")
        return ChosenPreset(best, chosen, whole, checked)

    def _trials(self, candidate: Candidate, shares: Sequence[float], retain: float | None) -> list[Trial]:
        """Ratios from the largest on, until one retains too little; from the last that does not, energy budgets."""
        trials = self._down(candidate, [{"type": "ratio", "keep": share} for share in shares], retain)
        enough = [trial.budget["keep"] for trial in trials if retain is None or trial.retained.share >= retain]
        if enough and not METHODS[candidate.method].preprocesses:
            energies = (self._energy(share) for share in shares if share <= enough[-1])
            trials += self._down(candidate, list(filter(None, energies)), retain)
        self._progress.total = self._progress.n + _questions(self.held_out)
        return trials

    def _down(self, candidate: Candidate, budgets: Sequence[Mapping[str, Any]], retain: float | None) -> list[Trial]:
        """Budgets, from the largest on until one retains too little."""
        trials: list[Trial] = []
        for budget in budgets:
            self._progress.set_description_str(f"budget {_shown(budget)}")
            arm = _arm(candidate, budget)
            self._answered([arm], self.searched)
            tokens = fmean(answer.tokens for answer in self._of(arm, self.searched))
            trials.append(Trial(budget, tokens, self._retained(arm, self.searched)))
            if retain is not None and trials[-1].retained.share < retain:
                break
        return trials

    def _energy(self, share: float) -> Mapping[str, Any] | None:
        """An energy budget that keeps a share of the tokens on average; None if the features' rank is too low."""
        mean = share * self.encoded.mean_tokens
        least = max(1, int(mean * FLOOR))
        threshold = threshold_for(self.encoded.pictures, mean, least)
        if threshold is not None and threshold <= LARGEST:
            return {"type": "energy", "threshold": threshold, "min_tokens": least}
        most = mean_kept(self.encoded.pictures, LARGEST, least)
        self._progress.write(
            f"An energy budget keeps at most {most:.1f} tokens on average here (the features' rank); for {mean:.1f}, "
            f"take a ratio of {share:.4g}.",
            sys.stderr,
        )
        return None

    def _total(self, tried: Sequence[Candidate], rungs: Sequence[int], shares: int) -> int:
        """Answers to ask for, at most if the first choice holds."""
        total = _questions(self.searched) * (1 + 2 * shares) + 2 * _questions(self.held_out)
        for left, size, before in zip(survivors(len(tried), len(rungs)), rungs, [0, *rungs], strict=False):
            total += left * len(self._shares) * _questions(self.searched[before:size])
        return total

    def _answered(self, arms: Sequence[Arm], asked: Sequence[Picture]) -> None:
        self.ask(asked, arms, self._progress.update)

    def _retained(self, arm: Arm, asked: Sequence[Picture]) -> Retained:
        return retained(self._of(arm, asked), self._of(UNPRUNED, asked), known=self.known)

    def _of(self, arm: Arm, asked: Sequence[Picture]) -> list[Answer]:
        answers = self.answers.of(arm)
        return [answers[picture.name(index)] for picture in asked for index in range(len(picture.questions))]

    def _something_to_retain(self) -> None:
        if not self.known:
            return
        for asked in filter(None, (self.searched, self.held_out)):
            answers = self._of(UNPRUNED, asked)
            right = sum(answer.right for answer in answers)
            if not right:
                held = " held-out" if asked is self.held_out else ""
                raise NoPreset(
                    f"the unpruned model answers 0 of {len(answers)}{held} questions right, so there is nothing to "
                    f"retain; expected answers as the model words them, such as {json.dumps(answers[0].text.strip())}"
                )

    def _compare(self, left: Sequence[Candidate], size: int, rungs: Sequence[int]) -> list[float]:
        """What candidates retain on the first pictures, as the mean over budgets."""
        number = rungs.index(size)
        self._progress.set_description_str(f"{len(left)} methods, {number + 1} of {len(rungs)}")
        arms = [[_arm(candidate, {"type": "ratio", "keep": share}) for share in self._shares] for candidate in left]
        before = rungs[number - 1] if number else 0
        self._answered([arm for of in arms for arm in of], self.searched[before:size])
        for candidate, of in zip(left, arms, strict=True):
            shares = [self._retained(arm, self.searched[:size]).share for arm in of]
            self._compared[candidate.name] = (_questions(self.searched[:size]), shares)
        return [fmean(self._compared[candidate.name][1]) for candidate in left]

    def _check(
        self, candidate: Candidate, trials: Sequence[Trial], retain: float | None
    ) -> tuple[Trial | None, Retained | None]:
        """The first trial that retains enough on the held-out pictures too; None if none does."""
        checked = None
        for trial in trials:
            if not self.held_out:
                return trial, None
            self._progress.set_description_str("held-out pictures")
            arm = _arm(candidate, trial.budget)
            self._answered([arm], self.held_out)
            checked = self._retained(arm, self.held_out)
            if retain is None or checked.share >= retain:
                return trial, checked
            self._progress.write(
                f"{_shown(trial.budget)} retains {checked} on the held-out pictures; trying the next larger budget.",
                sys.stderr,
            )
        return None, checked

    def _print(self, candidate: Candidate, trials: Sequence[Trial], chosen: Trial | None) -> None:
        """The methods, the longest in the race first, and the budgets of the best one."""
        if self._compared:
            ranked = sorted(self._compared.items(), key=lambda item: (-item[1][0], -fmean(item[1][1])))
            tokens = [f"{share * self.encoded.mean_tokens:.0f}" for share in self._shares]
            rows = [[name, str(questions), *map(percent, shares)] for name, (questions, shares) in ranked]
            print(table(["method", "questions", *(f"retained at {count}" for count in tokens)], rows), end="\n\n")
        rows = [
            [
                _shown(trial.budget),
                f"{trial.mean_tokens:.1f}",
                str(trial.retained),
                "chosen" if trial is chosen else "",
            ]
            for trial in trials
        ]
        print(table([f"budget of {candidate.name}", "mean tokens", "retained, 95 % interval", ""], rows), end="\n\n")


def _arm(candidate: Candidate, budget: Mapping[str, Any]) -> Arm:
    return Arm(candidate.name, candidate.policy(budget), candidate.method)


def _questions(asked: Sequence[Picture]) -> int:
    return sum(len(picture.questions) for picture in asked)

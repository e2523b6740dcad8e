"""`vtprune calibrate`: find a preset for your images, from a mean token count or a retained accuracy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_vtprune.plugin.inspection import InspectionFailed
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.presets import PRESET_NAME
from vllm_vtprune.selectors.registry import SELECTORS
from vllm_vtprune_evaluation.answers import Answer, Answers, AnswersError, subject
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm
from vllm_vtprune_evaluation.asking import Unasked, ask_all
from vllm_vtprune_evaluation.options import (
    add_model_arguments,
    count,
    dtype_of,
    embedded_model,
    interrupted,
    served,
    shown,
)
from vllm_vtprune_evaluation.questions import Picture, SampleError, pictures, plain, read_sample
from vllm_vtprune_evaluation.report import aligned, markdown
from vllm_vtprune_evaluation.spectra import Sample, sample_pictures
from vllm_vtprune_evaluation.thresholds import mean_kept, threshold_for
from vllm_vtprune_server.process import ServerFailed

LARGEST = 0.9999  # largest threshold; above it, rounding decides
SHARES = (1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)  # keep ratios to try
SCENE_QUESTIONS = 300
ANSWERS = "answers.jsonl"  # below --work
METHODS_OF_ANY_SIZE = [name for name, method in SELECTORS.items() if not method.capped]

EXAMPLE = """examples:
  vtprune calibrate --tokens 128 --model llava-hf/llava-1.5-7b-hf --sample questions.jsonl --out presets.toml
  vtprune calibrate --retain 0.99 --model llava-hf/llava-1.5-7b-hf --sample questions.jsonl --out presets.toml
  vtprune serve llava-hf/llava-1.5-7b-hf --pruning-presets presets.toml --pruning-default calibrated

a line of questions.jsonl, whose answer may be left out:
  {"image": "photographs/1.jpg", "question": "What colour is the bus?", "answer": "red"}
"""


@dataclass(frozen=True)
class Trial:
    """The result of one energy threshold.

    Attributes:
        threshold: energy threshold.
        mean_tokens: mean kept tokens per picture.
        retained: right answers relative to the unpruned model, or share of unchanged answers; None: not measured.
    """

    threshold: float
    mean_tokens: float
    retained: float | None = None


def calibrate(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the command line after ``vtprune calibrate``.

    Raises:
        SystemExit: 2 for invalid options; 1 if the sample, the server or a request fails, or no trial reaches the
            target; 130 when interrupted.
    """
    args = _parse(argv)
    try:
        model = args.model or embedded_model()
        sample = read_sample(args.sample) if args.sample else list(pictures("validation", SCENE_QUESTIONS))
        encoded = sample_pictures(model, sample, dtype_of(args))
        if args.tokens is not None:
            trials = [_trial(encoded, args.tokens)]
        else:
            trials = _run_trials(args, model, sample, encoded)
        chosen = choose(trials, args.retain)
        if args.retain is not None:
            print(aligned(_table(trials, chosen)), flush=True)
            print(f"Answers: {shown(args.work / ANSWERS)}", file=sys.stderr)
        if chosen is None:
            sys.exit(f"vtprune calibrate: nothing that was tried retains {args.retain:g}; the largest budget is above.")
        args.out.write_text(_preset(args, model, sample, chosen))
    except KeyboardInterrupt:
        interrupted()
    except (SampleError, InspectionFailed, ServerFailed, AnswersError, Unasked, PolicyError, _NoThreshold) as error:
        sys.exit(f"vtprune calibrate: {error}")
    print(f"{args.out}: preset {args.name} keeps {chosen.mean_tokens:.1f} tokens on average over questions.")


def choose(trials: Sequence[Trial], retain: float | None) -> Trial | None:
    """The last trial before the first one that retains too little; None if there is none.

    Args:
        trials: trials, most tokens first.
        retain: required share; None: no requirement.
    """
    chosen = None
    for trial in trials:
        if retain is not None and trial.retained is not None and trial.retained < retain:
            break
        chosen = trial
    return chosen


def retained(answers: Sequence[Answer], unpruned: Sequence[Answer], *, known: bool) -> float:
    """The retained share of the unpruned model's accuracy.

    Args:
        answers: answers to the sample's questions.
        unpruned: the unpruned model's answers, in the same order.
        known: whether the right answers are known; else the share of unchanged answers counts.
    """
    if known:
        return sum(answer.right for answer in answers) / max(1, sum(answer.right for answer in unpruned))
    same = [plain(answer.text) == plain(other.text) for answer, other in zip(answers, unpruned, strict=True)]
    return sum(same) / len(same)


class _NoThreshold(Exception):
    pass


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vtprune calibrate",
        description="Find the energy threshold that keeps a number of tokens on average, or the smallest budget that "
        "retains a share of the model's accuracy, on a sample of pictures; write it as a preset.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--sample", type=Path, metavar="FILE", help="sample of your pictures, as JSON lines (default: generated scenes)"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--tokens", type=count, metavar="K", help="tokens to keep on average over questions; needs no server"
    )
    target.add_argument(
        "--retain",
        type=_share,
        metavar="SHARE",
        help="share of the unpruned model's right answers to retain; without answers: share of unchanged answers",
    )
    parser.add_argument(
        "--method", choices=METHODS_OF_ANY_SIZE, default="resprune", help="method (default: %(default)s)"
    )
    parser.add_argument("--name", type=_name, default="calibrated", help="name of the preset (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/calibrate"), help="folder for answers (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="presets file to write, such as presets.toml"
    )
    args = parser.parse_args(argv)
    if args.out.suffix != ".toml":
        parser.error(f"--out: {args.out} is not accepted; expected a name that ends in .toml")
    if args.out.exists() or not args.out.parent.is_dir():
        parser.error(
            f"--out: {args.out} is not accepted; expected a file that does not exist yet, in a folder that does"
        )
    return args


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; expected a number above 0 and at most 1")
    return share


def _name(text: str) -> str:
    if not PRESET_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted; expected a letter, then at most 63 letters, digits and any of _ . -"
        )
    return text


def _trial(encoded: Sample, tokens: float) -> Trial:
    threshold = threshold_for(encoded.pictures, tokens)
    if threshold is None:
        most = mean_kept(encoded.pictures, 1.0)
        raise _NoThreshold(f"no energy threshold keeps {tokens:g} tokens on average; at most it is {most:.1f} here")
    return Trial(threshold, mean_kept(encoded.pictures, threshold))


def _run_trials(args: argparse.Namespace, model: str, sample: Sequence[Picture], encoded: Sample) -> list[Trial]:
    """Evaluate every reachable budget of `SHARES`, or the largest reachable one before them."""
    has_answer = {bool(question.answer) for picture in sample for question in picture.questions}
    if len(has_answer) > 1:
        raise SampleError("some questions have an answer and others have none; expected all or none")
    known = has_answer == {True}
    largest = mean_kept(encoded.pictures, LARGEST)
    budgets = [share * encoded.mean_tokens for share in SHARES]
    if budgets[0] > largest:
        print(f"Energy budgets keep at most {largest:.1f} tokens on average here.", file=sys.stderr)
    trials = [Trial(LARGEST, largest)] if budgets[0] > largest else []
    trials += [_trial(encoded, tokens) for tokens in budgets if tokens <= largest]
    arms = [Arm(f"{trial.mean_tokens:.1f}", _policy(args, trial), args.method, adaptive=True) for trial in trials]
    PruningPolicy.parse(arms[0].policy)
    args.work.mkdir(parents=True, exist_ok=True)
    dtype = dtype_of(args)
    depends_on = subject(model, args.url or dtype, sample)
    with Answers(args.work / ANSWERS, depends_on) as answers, served(args.url, model, dtype) as url:
        ask_all(url, model, sample, [UNPRUNED, *arms], answers)
        names = [picture.name(index) for picture in sample for index in range(len(picture.questions))]
        unpruned = [answers.of(UNPRUNED)[name] for name in names]
        return [
            Trial(
                trial.threshold,
                trial.mean_tokens,
                retained([answers.of(arm)[name] for name in names], unpruned, known=known),
            )
            for trial, arm in zip(trials, arms, strict=True)
        ]


def _policy(args: argparse.Namespace, trial: Trial) -> dict[str, object]:
    return {"method": args.method, "budget": {"type": "energy", "threshold": trial.threshold, "min_tokens": 1}}


def _table(trials: Sequence[Trial], chosen: Trial | None) -> str:
    rows = [
        [
            "chosen" if trial is chosen else "",
            f"{trial.mean_tokens:.1f}",
            f"{trial.threshold:.6f}",
            "-" if trial.retained is None else f"{100 * trial.retained:.1f} %",
        ]
        for trial in trials
    ]
    return markdown(["", "mean tokens", "threshold", "retained"], rows)


def _preset(args: argparse.Namespace, model: str, sample: Sequence[Picture], chosen: Trial) -> str:
    """The presets file."""
    questions = sum(len(picture.questions) for picture in sample)
    summary = f"{len(sample)} pictures, {chosen.mean_tokens:.1f} tokens on average over questions"
    if chosen.retained is not None:
        summary += f", {questions} questions, {100 * chosen.retained:.1f} % retained"
    return (
        f"# vtprune calibrate, {model}: {summary}\n"
        f"[{json.dumps(args.name)}]\n"
        f"method = {json.dumps(args.method)}\n"
        f'budget = {{type = "energy", threshold = {chosen.threshold!r}, min_tokens = 1}}\n'
    )

"""`vtprune eval`: the accuracy of methods and presets on scenes with known answers."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_vtprune.plugin.inspection import InspectionFailed
from vllm_vtprune.policy import BUILTIN_PRESETS, PolicyError
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune_evaluation import arms as ways
from vllm_vtprune_evaluation.ablations import ABLATIONS, SOLVERS, solver_arms
from vllm_vtprune_evaluation.answers import Answers, AnswersError, subject
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm
from vllm_vtprune_evaluation.asking import Unasked, ask_all
from vllm_vtprune_evaluation.gallery import draw_gallery
from vllm_vtprune_evaluation.in_llm import InLLM, Pruning
from vllm_vtprune_evaluation.offline import SERVED_AS, OfflineFailed, answer_offline, check_model
from vllm_vtprune_evaluation.options import (
    add_model_arguments,
    count,
    dtype_of,
    embedded_model,
    interrupted,
    make_folder,
    names,
    served,
    shown,
)
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import Picture, pictures
from vllm_vtprune_evaluation.reference import answer_all, layers_of, reference_arms, reference_model
from vllm_vtprune_evaluation.report import (
    accuracy_table,
    budget_table,
    difference_table,
    plot_accuracy,
    plot_budgets,
    split_table,
)
from vllm_vtprune_evaluation.results import (
    Difference,
    Result,
    adaptive_against_fixed,
    against_reference,
    comparable,
    differences,
    ranked_kinds,
    results,
)
from vllm_vtprune_evaluation.spectra import Sample, sample_pictures
from vllm_vtprune_evaluation.tables import aligned, percent
from vllm_vtprune_evaluation.thresholds import threshold_for
from vllm_vtprune_server.process import ServerFailed

METHODS_BY_DEFAULT = ("resprune", "adaptprune", "divprune", "fastervlm", "random", "uniform")
CALIBRATION_QUESTIONS = 1500  # validation questions (about 230 pictures) for the thresholds of "+E"
SOLVERS_KEEP = 24  # tokens; 24 of 192 dimensions, like the paper's 130 of 1,024

EXAMPLE = """examples:
  vtprune eval                                              # a few methods at 128 and 64 tokens, 200 questions
  vtprune eval --methods all --keep 192,128,64,32 --adaptive --questions 2000 --out build/eval
  vtprune eval --offline --split validation --methods all   # to choose by; --split test to report
  vtprune eval --ablation resprune-seed
"""


def evaluate(argv: list[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: 2 for invalid options, 1 if the server or a request fails, 130 when interrupted.
    """
    args = _parse(argv)
    try:
        make_folder(args.out, "--out")
        model = args.model or embedded_model()
        weights = model if args.merged is None else str(args.merged)
        dtype = "float32" if args.offline else dtype_of(args)
        with Progress(desc="Preparing pictures"):
            asked = list(pictures(args.split, args.questions, args.seed))
            if args.offline:
                check_model(model)
        reference = reference_model(model) if args.in_llm else None
        arms, inside = _arms(args, model, dtype, asked, reference)
        ways.check(arms)
        depends_on = subject(weights, SERVED_AS if args.offline else args.url or dtype, asked)
        with Answers(args.out / "answers.jsonl", depends_on) as answers:
            if args.offline:
                answer_offline(model, asked, [UNPRUNED, *arms], answers, args.merged)
            else:
                with served(args.url, model, dtype) as url:
                    ask_all(url, model, asked, [UNPRUNED, *arms], answers)
            if reference is not None:
                answer_all(reference, asked, inside, answers)
        about = {"command": shlex.join(["vtprune", "eval", *argv]), **depends_on, "pictures": len(asked)}
        with Progress(desc="Writing results"):
            evaluation = _results(
                [UNPRUNED, *arms, *(arm for arm, _ in inside)], answers, asked, about, split=bool(args.ablation)
            )
            files = evaluation.write(args.out)
            adaptive = [arm for arm in arms if arm.adaptive]
            if adaptive:
                files.append(args.out / "budgets.png")
                plot_budgets(_budgets(adaptive, answers, asked), files[-1])
        if args.gallery:
            files.append(args.out / "gallery.png")
            draw_gallery(model, dtype, asked, arms, answers, files[-1])
    except KeyboardInterrupt:
        interrupted()
    except (InspectionFailed, ServerFailed, OfflineFailed, AnswersError, Unasked, PolicyError) as error:
        sys.exit(f"vtprune eval: {error}")
    print(json.dumps(evaluation.to_json()) if args.json else aligned(accuracy_table(evaluation.all_kinds)), flush=True)
    print(f"Results: {', '.join([shown(files[0]), *(file.name for file in files[1:])])}", file=sys.stderr)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vtprune eval",
        description="Ask a server about scenes with known answers, once per method and budget; compare accuracies. "
        "Answers that --out already holds are not asked for again.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--offline",
        action="store_true",
        help="run without a server: same answers, many times faster (float32, all cores; LLaVA-1.5 only)",
    )
    parser.add_argument(
        "--merged",
        type=Path,
        metavar="DIR",
        help="ask the demo model with the 2 x 2 merger, of 144 tokens, that `python -m training.merged` put "
        "in the place of its projector (with --offline and --ablation)",
    )
    parser.add_argument(
        "--split",
        choices=["test", "validation"],
        default="test",
        help='scenes: choose on "validation", report on "test" (default: %(default)s); the thresholds of "+E" come '
        'from other scenes of "validation"',
    )
    parser.add_argument(
        "--questions", type=count, default=200, metavar="N", help="number of questions (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="index of the first scene (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--methods",
        type=_methods,
        default=list(METHODS_BY_DEFAULT),
        metavar="A,B",
        help=f'"all", "none", or any of {", ".join(METHODS)} (default: {",".join(METHODS_BY_DEFAULT)})',
    )
    parser.add_argument("--keep", type=_counts, metavar="K,L", help="budgets, in tokens per picture (default: 128,64)")
    parser.add_argument(
        "--adaptive",
        action="store_true",
        help='add "+E": the same methods with energy budgets that keep as many tokens on average',
    )
    parser.add_argument(
        "--presets",
        type=partial(names, known=BUILTIN_PRESETS),
        default=[],
        metavar="A,B",
        help=f'"all", or any of {", ".join(BUILTIN_PRESETS)}',
    )
    which.add_argument(
        "--ablation",
        choices=[*ABLATIONS, SOLVERS],
        help="rows of a paper's table instead of --methods: "
        + "; ".join(f"{name}, {ablation.title}" for name, ablation in ABLATIONS.items())
        + f"; {SOLVERS}, E-AdaPrune, Table 4",
    )
    parser.add_argument(
        "--in-llm",
        action="store_true",
        help="add methods that prune inside the language model, in plain transformers (slow; LLaVA-1.5 only)",
    )
    parser.add_argument("--gallery", action="store_true", help="draw what each method keeps of the first scenes")
    parser.add_argument("--out", type=Path, default=Path("build/eval"), help="output folder (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object on the last line")
    args = parser.parse_args(argv)
    if args.offline and args.url:
        parser.error("--offline: cannot be combined with --url")
    if args.merged and (not args.offline or args.ablation not in ABLATIONS or args.model or args.gallery):
        parser.error("--merged: needs --offline and --ablation, and cannot be combined with --model or --gallery")
    if args.ablation and (args.keep or args.adaptive or args.presets or args.in_llm):
        parser.error("--ablation: cannot be combined with --keep, --adaptive, --presets or --in-llm")
    args.keep = args.keep or [128, 64]
    return args


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(count(part) for part in text.split(",")))


def _methods(text: str) -> list[str]:
    return [] if text == "none" else names(text, METHODS)


def _arms(
    args: argparse.Namespace, model: str, dtype: str, asked: Sequence[Picture], reference: InLLM | None
) -> tuple[list[Arm], list[tuple[Arm, Pruning | None]]]:
    """The arms that the options request: on the server, and inside the language model."""
    if args.ablation in ABLATIONS:
        return ABLATIONS[args.ablation].arms(), []
    solvers = args.ablation == SOLVERS
    adaptive = args.adaptive or solvers
    beyond = int(asked[-1].label) + 1 if args.split == "validation" else 0
    others = list(pictures("validation", CALIBRATION_QUESTIONS if adaptive else 1, beyond))
    sample = sample_pictures(model, others, dtype)
    thresholds = _thresholds(sample, [SOLVERS_KEEP] if solvers else args.keep) if adaptive else {}
    if solvers and not thresholds:
        raise InspectionFailed(f"--ablation {SOLVERS}: the features' rank is below {SOLVERS_KEEP}")
    if solvers:
        return solver_arms(thresholds[SOLVERS_KEEP], SOLVERS_KEEP, sample.features.encoder.shape[1]), []
    methods = ways.usable(args.methods, sample.family)
    if left_out := [method for method in args.methods if method not in methods]:
        print(f"Skipped, because the model lacks what they need: {', '.join(left_out)}.", file=sys.stderr)
    arms = [
        *ways.grid(methods, args.keep, thresholds, sample.features),
        *ways.own_counts(methods),
        *ways.presets(args.presets),
    ]
    if reference is None:
        return arms, []
    return arms, reference_arms(args.keep, thresholds, sample.features.num_tokens, layers_of(reference))


def _thresholds(sample: Sample, keeps: Sequence[int]) -> dict[int, float]:
    thresholds = {}
    for keep in keeps:
        threshold = threshold_for(sample.pictures, keep)
        if threshold is None:
            print(
                f"No energy threshold keeps {keep} tokens on average: the features' rank is too low.", file=sys.stderr
            )
        else:
            thresholds[keep] = threshold
    return thresholds


@dataclass(frozen=True)
class Evaluation:
    """Results over all questions, and over the kinds of question used for ranking.

    Attributes:
        about: the command, and the subject of its answers.
        all_kinds: one result per arm, the unpruned model's first.
        ranked: the same over `kinds`.
        kinds: kinds of question that the unpruned model answers well enough.
        paired: one arm against all others at the same budget, over `kinds`.
        by_kind: for an ablation, `paired` over each kind of question, and over all.
        adaptive: each "+E" against its fixed budget, over `kinds`.
    """

    about: Mapping[str, Any]
    all_kinds: Sequence[Result]
    ranked: Sequence[Result]
    kinds: Sequence[str]
    paired: Sequence[Difference]
    by_kind: Mapping[str, Sequence[Difference]]
    adaptive: Sequence[Difference]

    def to_json(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return {
            "about": dict(self.about),
            "results": [asdict(result) for result in self.all_kinds],
            "ranked_kinds": list(self.kinds),
            "ranked_results": [asdict(result) for result in self.ranked],
            "paired": [asdict(difference) for difference in self.paired],
            "paired_by_kind": {kind: [asdict(pair) for pair in pairs] for kind, pairs in self.by_kind.items()},
            "adaptive_less_fixed": [asdict(difference) for difference in self.adaptive],
        }

    def write(self, directory: Path) -> list[Path]:
        """Write ``results.md``, ``results.json`` and ``accuracy.png``; returns their paths."""
        tables, values, plot = (directory / name for name in ("results.md", "results.json", "accuracy.png"))
        values.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        unpruned, *others = self.ranked or self.all_kinds
        ranking = "No kind of question is answered well enough to rank by. Over all of them:"
        if self.kinds:
            ranking = (
                f"Ranking, over the {unpruned.questions} questions of the kinds that the unpruned model answers well "
                f"enough ({', '.join(self.kinds)}), {percent(unpruned.accuracy)} unpruned:"
            )
        parts = [
            f"`{self.about['command']}`: {self.all_kinds[0].questions} questions about {self.about['pictures']} "
            "pictures. 95 % intervals resample pictures.",
            ranking,
            budget_table(comparable(others)),
            *self._differences(others),
            "Every way, over all kinds:",
            accuracy_table(self.all_kinds),
            "By kind of question:",
            split_table(self.all_kinds, "kind"),
            "By density of the picture:",
            split_table(self.all_kinds, "density"),
        ]
        tables.write_text("\n\n".join(parts))
        plot_accuracy(others, unpruned, plot)
        return [tables, values, plot]

    def _differences(self, ranked: Sequence[Result]) -> Iterator[str]:
        """The paired comparisons, each with an introductory line."""
        over = "in points on the same questions, with 95 % intervals over pictures, in bold where they exclude 0"
        row = {result.arm: result.row for result in ranked}
        if self.paired:
            yield f"`{row[self.paired[0].arm]}` less each other at the same budget, {over}:"
            yield difference_table(self.paired)
        if self.adaptive:
            yield f'"+E" less the fixed budget, {over} ({", ".join(self._means(ranked))}):'
            yield difference_table(self.adaptive)

    def _means(self, ranked: Sequence[Result]) -> Iterator[str]:
        """Mean tokens of "+E" at each budget, over methods."""
        tokens: dict[int | None, list[float]] = {}
        for result in ranked:
            if result.arm in {difference.arm for difference in self.adaptive}:
                tokens.setdefault(result.keep, []).append(result.mean_tokens)
        return (f"{fmean(means):.1f} tokens at {keep}" for keep, means in tokens.items())


def _budgets(arms: Sequence[Arm], answers: Answers, asked: Sequence[Picture]) -> dict[int, dict[str, list[float]]]:
    """Tokens per picture, by budget and density, from one arm per budget (energy budgets are equal for all methods)."""
    tokens: dict[int, dict[str, list[float]]] = {}
    for arm in arms:
        if arm.keep is None or arm.keep in tokens:
            continue
        by_density = tokens.setdefault(arm.keep, {})
        for picture in asked:
            by_density.setdefault(picture.density, []).append(answers.of(arm)[picture.name(0)].tokens)
    return tokens


def _results(
    arms: Sequence[Arm], answers: Answers, asked: Sequence[Picture], about: Mapping[str, Any], *, split: bool
) -> Evaluation:
    names = {picture.name(index) for picture in asked for index in range(len(picture.questions))}
    by_arm = [(arm, {name: answers.of(arm)[name] for name in names}) for arm in arms]
    unpruned = by_arm[0][1]
    kinds = ranked_kinds(unpruned.values())
    ranked = results(by_arm, unpruned, kinds) if kinds else []
    all_kinds = results(by_arm, unpruned)
    compared = ranked or all_kinds
    pairs = against_reference(comparable(compared))
    paired, adaptive = (
        differences(selected, by_arm, unpruned, kinds or None) for selected in (pairs, adaptive_against_fixed(compared))
    )
    by_kind = {}
    if split:
        by_kind = {kind: differences(pairs, by_arm, unpruned, [kind]) for kind in all_kinds[0].by_kind}
        by_kind["all"] = differences(pairs, by_arm, unpruned)
    return Evaluation(about, all_kinds, ranked, kinds, paired, by_kind, adaptive)

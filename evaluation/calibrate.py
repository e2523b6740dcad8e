"""`vtprune calibrate`: find a preset for your images: the method, its parameters and the budget."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vllm_vtprune.plugin.inspection import InspectionFailed
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.presets import PRESET_NAME
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune_evaluation.answers import Answers, AnswersError, subject
from vllm_vtprune_evaluation.asking import Unasked, ask_all
from vllm_vtprune_evaluation.offline import SERVED_AS, OfflineFailed, Workers, check_model
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
from vllm_vtprune_evaluation.preset_search import Ask, NoPreset, Search
from vllm_vtprune_evaluation.progress import Progress, quiet
from vllm_vtprune_evaluation.questions import SampleError, pictures, read_sample
from vllm_vtprune_evaluation.search import METHODS_TO_TRY, Candidate, candidates
from vllm_vtprune_evaluation.spectra import sample_pictures
from vllm_vtprune_server.process import ServerFailed

HELD_OUT = 3  # every third picture, which the search does not see
SCENE_QUESTIONS = 450
ANSWERS = "answers.jsonl"  # below --work

EXAMPLE = """examples:
  vtprune calibrate --retain 0.99 --model llava-hf/llava-1.5-7b-hf --sample questions.jsonl --out presets.toml
  vtprune calibrate --tokens 128 --model llava-hf/llava-1.5-7b-hf --sample questions.jsonl --out presets.toml
  vtprune serve llava-hf/llava-1.5-7b-hf --pruning-presets presets.toml --pruning-default calibrated

a line of questions.jsonl, whose answer may be left out:
  {"image": "photographs/1.jpg", "question": "What colour is the bus?", "answer": "red"}
"""


def calibrate(argv: list[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: 2 for invalid options; 1 if the sample, the server or a request fails, or nothing reaches the
            target; 130 when interrupted.
    """
    args = _parse(argv)
    try:
        _calibrate(args)
    except KeyboardInterrupt:
        interrupted()
    except (
        SampleError, InspectionFailed, ServerFailed, AnswersError, Unasked, OfflineFailed, PolicyError, NoPreset,
    ) as error:  # fmt: skip
        sys.exit(f"vtprune calibrate: {error}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vtprune calibrate",
        description="Find the method, its parameters and the budget that keep most of a model's answers, on a sample\n"
        "of your pictures; check them on the part of the sample that the search did not see; write a preset.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--offline",
        action="store_true",
        help="answer without a server, many times faster (float32, all cores; LLaVA-1.5 only); the default for the "
        "demo model",
    )
    parser.add_argument(
        "--sample", type=Path, metavar="FILE", help="sample of your pictures, as JSON lines (default: generated scenes)"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--retain",
        type=_share,
        metavar="SHARE",
        help="find the fewest tokens that retain this share of the unpruned model's right answers; without answers: of "
        "answers that stay the same",
    )
    target.add_argument("--tokens", type=count, metavar="K", help="find what retains most with K tokens on average")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--methods",
        type=partial(names, known=METHODS),
        metavar="A,B",
        help=f'methods to try: "all", or any of {", ".join(METHODS)} (default: the best of each kind)',
    )
    which.add_argument(
        "--method", choices=list(METHODS), help="only this method with its default parameters; finds the budget"
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
    if args.offline and args.url:
        parser.error("--offline: cannot be combined with --url")
    args.offline = args.offline or not (args.model or args.url)
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


def _calibrate(args: argparse.Namespace) -> None:
    make_folder(args.work, "--work")
    model = args.model or embedded_model()
    with Progress(desc="Preparing pictures"):
        quiet()
        if args.offline:
            check_model(model)
        sample = read_sample(args.sample) if args.sample else list(pictures("validation", SCENE_QUESTIONS))
    has_answer = {bool(question.answer) for picture in sample for question in picture.questions}
    if len(has_answer) > 1:
        raise SampleError("some questions have an answer and others have none; expected all or none")
    dtype = "float32" if args.offline else dtype_of(args)
    held_out = sample[HELD_OUT - 1 :: HELD_OUT]
    searched = [picture for index, picture in enumerate(sample, 1) if index % HELD_OUT]
    encoded = sample_pictures(model, searched, dtype)
    if args.tokens and args.tokens >= encoded.mean_tokens:
        raise NoPreset(f"--tokens: {args.tokens} given; expected fewer than the {encoded.mean_tokens:.1f} of a picture")
    if args.method:
        tried = [Candidate(args.method, {"method": args.method})]
    else:
        tried = candidates(args.methods or METHODS_TO_TRY, encoded.family)
    if not tried:
        raise NoPreset("--methods: this model can run none of these with any number of tokens")
    depends_on = subject(model, SERVED_AS if args.offline else args.url or dtype, sample)
    with (
        Answers(args.work / ANSWERS, depends_on) as answers,
        _asking(args, model, dtype, answers) as ask,
    ):
        result = Search(ask, answers, encoded, searched, held_out, known=has_answer == {True}).run(
            tried, tokens=args.tokens, retain=args.retain
        )
    args.out.write_text(result.preset(args.name, model))
    print(f"{args.out}: {result.sentence(args.name)}")
    print(f"Answers: {shown(args.work / ANSWERS)}", file=sys.stderr)


@contextmanager
def _asking(args: argparse.Namespace, model: str, dtype: str, answers: Answers) -> Iterator[Ask]:
    """A way to ask, for the context: offline, or a server."""
    if args.offline:
        with Workers(model) as workers:
            yield lambda asked, arms, progress: workers.answer(asked, arms, answers, progress)
        return
    with served(args.url, model, dtype) as url:
        yield lambda asked, arms, progress: ask_all(url, model, asked, arms, answers, progress)

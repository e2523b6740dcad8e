"""`vtprune inspect`: which tokens of an image a policy keeps, without an engine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vllm_vtprune.options import unknown_value
from vllm_vtprune.overlay import enlarged, side_by_side, with_caption
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.presets import builtin_presets
from vllm_vtprune.report import ImageReport
from vllm_vtprune_checkpoints import RANDOM_WEIGHTS, weights_of
from vllm_vtprune_evaluation.options import add_family_argument, model_of
from vllm_vtprune_evaluation.progress import Progress, quiet
from vllm_vtprune_server.launch import policy_argument
from vllm_vtprune_server.policies import Policies

PARAM = "--pruning"
POLICY = "balanced"
FILE = Path("kept.png")
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf")  # that hold the colours of a figure

EXAMPLE = """example:
  vtprune inspect street.jpg --query "What colour is the bus?" --model llava-hf/llava-1.5-7b-hf
  vtprune inspect page.png --pruning balanced fast '{"method": "adaptprune"}' --out three.png
"""


def inspect(argv: list[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: 2 for invalid options, 1 for an image or a model that cannot be inspected.
    """
    parser = argparse.ArgumentParser(
        prog="vtprune inspect",
        description="Draw an image and, beside it, which of its visual tokens policies keep. Dropped tokens fade; what "
        "the model never sees is hatched. Loads the vision encoder, no engine.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--query", default="", help="question that guides the selection (default: none)")
    parser.add_argument(
        "--pruning",
        default=[POLICY],
        metavar="POLICY",
        nargs="+",
        help=f"presets ({', '.join(builtin_presets())}) or policies as JSON, drawn side by side (default: {POLICY})",
    )
    parser.add_argument("--model", help="directory of a model, or name on the hub")
    add_family_argument(parser)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model's repository brings"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=FILE,
        metavar="FILE",
        help=f"image to write, {', '.join(FORMATS)} (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the reports as one JSON object on the last line")
    args = parser.parse_args(argv)
    require_writable(parser, args.out)
    try:
        policies = {text: _policy(text) for text in args.pruning}
    except PolicyError as error:
        parser.error(str(error))
    weights = weights_of(args.model, args.family)
    model, brings_code = model_of(args)
    try:
        with Image.open(args.image) as opened:
            picture = opened.convert("RGB")
        reports, figure = _draw(picture, args.query, policies, model, args.trust_remote_code or brings_code)
        if weights == "random":
            figure = with_caption(figure, RANDOM_WEIGHTS)
        figure.save(args.out)
    except (OSError, PolicyError) as error:
        sys.exit(f"vtprune inspect: {error}")
    if args.json:
        print(json.dumps({"weights": weights, "images": [report.to_json() for report in reports]}))
        return
    if weights == "random":
        print(RANDOM_WEIGHTS)
    for name, report in zip(policies, reports, strict=True):
        print(f"{name}: {', '.join(filter(None, _lines(report)))}")
    print(f"Drawn in {args.out}")


def require_writable(parser: argparse.ArgumentParser, out: Path) -> None:
    """Exit with an error of ``--out`` unless an image can be written there."""
    if out.suffix.lower() not in FORMATS:
        parser.error(f"--out: {out} is not accepted; expected a name that ends in {', '.join(FORMATS)}")
    if not os.access(out if out.exists() else out.parent, os.W_OK) or out.is_dir():
        parser.error(f"--out: {out} cannot be written; expected a file in an existing folder")


def _policy(text: str) -> PruningPolicy:
    """A policy that can be drawn.

    Raises:
        PolicyError: it is invalid, or selects no tokens.
    """
    policies = Policies.of(POLICY)
    names = [name for name, policy in policies.presets.items() if policy.selects]
    accepted = f"a policy that selects tokens, as JSON or as a preset: {', '.join(names)}"
    value, _ = policies.split(policy_argument(text), param=PARAM)
    if isinstance(value, str) and value not in policies.presets:
        raise PolicyError(PARAM, value, accepted, unknown_value(value, names))
    policy = policies.parse(value, param=PARAM)
    if not policy.selects:
        resizes = f"method {policy.method} resizes the image and selects no tokens"
        raise PolicyError(PARAM, text, accepted, resizes if policy.enabled else f"{text} keeps every token")
    return policy


def _draw(
    picture: Image.Image, query: str, policies: dict[str, PruningPolicy], model: str, trust_remote_code: bool
) -> tuple[Sequence[ImageReport], Image.Image]:
    """The reports of policies by name, and the figure: the picture, and what each policy keeps of it.

    Raises:
        SystemExit: the model cannot be inspected.
    """
    with Progress(desc="Loading the vision encoder"):
        from vllm_vtprune.plugin.inspection import InspectionFailed, examine, features_of, pruning_processor

        quiet()
        try:
            processor = pruning_processor(model, trust_remote_code=trust_remote_code)
            features_of(processor, picture)
        except InspectionFailed as error:
            sys.exit(f"vtprune inspect: {error}")
    reports, panels = [], [with_caption(enlarged(picture), "The image", query)]
    for name, policy in Progress(policies.items(), desc="Selecting tokens", total=len(policies), unit="policies"):
        try:
            inspection = examine(processor, picture, policy, query)
        except InspectionFailed as error:
            sys.exit(f"vtprune inspect: {error}")
        reports.append(inspection.report)
        kept, nouns = _lines(inspection.report)
        panels.append(with_caption(enlarged(inspection.drawn), f"{name}: {kept}", nouns))
    return reports, side_by_side(panels)


def _lines(report: ImageReport) -> tuple[str, str]:
    """How many tokens are kept, and the nouns that guide the selection; empty without."""
    kept = f"{report.method} keeps {report.kept_tokens} of {report.visual_tokens} tokens"
    return kept, f"looking at {', '.join(report.nouns)}" if report.nouns else ""

"""`vtprune inspect`: which tokens of an image a policy keeps, without an engine."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vllm_vtprune.overlay import draw_kept, with_caption
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.presets import builtin_presets
from vllm_vtprune_checkpoints import DEFAULT, FAMILIES, RANDOM_WEIGHTS, WITH_CODE, embedded_checkpoint, weights_of

if TYPE_CHECKING:
    from vllm.multimodal.media import MediaWithBytes

    from vllm_vtprune.features import VisualFeatures
    from vllm_vtprune.plan import PruningPlan
    from vllm_vtprune.plugin.processor import PruningProcessor
    from vllm_vtprune.report import ImageReport

POLICY = "balanced"

EXAMPLE = """example:
  vtprune inspect street.jpg --query "What colour is the bus?" --model llava-hf/llava-1.5-7b-hf --out kept.png
"""


@dataclass(frozen=True)
class Inspection:
    """The result of a policy for one image.

    Attributes:
        image: the image's report, as in a server's response.
        drawn: the image with dropped parts faded.
    """

    image: dict[str, Any]
    drawn: Image.Image


class InspectionFailed(Exception):
    """The image or the model cannot be inspected; the message gives the reason."""


def inspect(argv: list[str]) -> None:
    """Run the command.

    Args:
        argv: the command line after ``vtprune inspect``.

    Raises:
        SystemExit: 2 for invalid options, 1 for an image or a model that cannot be inspected.
    """
    parser = argparse.ArgumentParser(
        prog="vtprune inspect",
        description="Draw which visual tokens of an image a policy keeps. Loads the vision encoder, no engine.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--query", default="", help="question that guides the selection (default: none)")
    parser.add_argument(
        "--pruning",
        default=POLICY,
        metavar="POLICY",
        help=f"a preset ({', '.join(builtin_presets())}) or a policy as JSON (default: %(default)s)",
    )
    parser.add_argument("--model", help="directory of a model, or name on the hub")
    parser.add_argument(
        "--family",
        choices=list(FAMILIES),
        default=DEFAULT,
        help="without --model: family of the small checkpoint to use (default: %(default)s)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the model's repository brings"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="image to write, such as kept.png")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on the last line")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out: {args.out} names no format; expected a name that ends in .png or .jpg")
    try:
        policy = PruningPolicy.parse(_json_or_name(args.pruning), param="--pruning", presets=builtin_presets())
    except PolicyError as error:
        parser.error(str(error))
    if not policy.enabled:
        parser.error(f"--pruning: {args.pruning} keeps every token; expected a policy that prunes")
    if not policy.selects:
        parser.error(
            f"--pruning: method {policy.method} resizes the image and selects no tokens; expected a policy that "
            "selects tokens"
        )
    try:
        with Image.open(args.image) as picture:
            picture.load()
        processor = pruning_processor(
            args.model or str(embedded_checkpoint(args.family)),
            trust_remote_code=args.trust_remote_code or (args.model is None and args.family in WITH_CODE),
        )
        inspection = examine(processor, picture, policy, args.query)
        weights = weights_of(args.model, args.family)
        random = weights == "random"
        (with_caption(inspection.drawn, "Random weights") if random else inspection.drawn).save(args.out)
    except (OSError, PolicyError, InspectionFailed) as error:
        sys.exit(f"vtprune inspect: {error}")
    image = inspection.image
    if args.json:
        print(json.dumps({"weights": weights, **image}))
        return
    if random:
        print(RANDOM_WEIGHTS)
    about = f", looking at {', '.join(image['nouns'])}" if image["nouns"] else ""
    print(f"{image['method']} keeps {image['kept_tokens']} of {image['visual_tokens']} tokens{about}: {args.out}")


def examine(processor: PruningProcessor, picture: Image.Image, policy: PruningPolicy, query: str) -> Inspection:
    """Select the tokens of one image as the server would, and draw them.

    Args:
        processor: the model's processor.
        picture: the image.
        policy: a policy that selects tokens.
        query: the conditioning text, if the policy uses it.

    Raises:
        PolicyError: the model's family lacks what the policy needs.
    """
    from vllm_vtprune.plugin.image import after_crop

    report, plan, features = plan_of(processor, picture, policy, query)
    seen = after_crop(processor, policy, picture.convert("RGB"))
    view = processor.view(seen.height, seen.width)
    return Inspection(report.to_json(), draw_kept(seen, features, plan.kept, view))


def pruning_processor(model: str, dtype: str = "auto", *, trust_remote_code: bool = False) -> PruningProcessor:
    """A model's pruning processor, without an engine.

    Args:
        model: a directory, or a name on the hub.
        dtype: dtype of the vision encoder; "auto": the model's own.
        trust_remote_code: whether to run code from the model's repository.

    Raises:
        InspectionFailed: the model cannot be read, or its architecture cannot be pruned.
    """
    from vllm import AsyncEngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from vllm_vtprune.plugin.processor import PruningProcessor
    from vllm_vtprune.plugin.register import register

    register()
    try:
        config = AsyncEngineArgs(model=model, dtype=dtype, trust_remote_code=trust_remote_code).create_model_config()
        processor = MULTIMODAL_REGISTRY.create_processor(config)
    except (OSError, ValueError) as error:
        raise InspectionFailed(f"{model}: {error}") from error
    if not isinstance(processor, PruningProcessor):
        raise InspectionFailed(f"{model} is of an architecture, or has a vision encoder, that cannot be pruned")
    return processor


def plan_of(
    processor: PruningProcessor, picture: Image.Image, policy: PruningPolicy, query: str
) -> tuple[ImageReport, PruningPlan, VisualFeatures]:
    """Report, plan and features of one image, as on the server.

    Raises:
        PolicyError: the model's family lacks what the policy needs.
    """
    from vllm_vtprune.plugin.image import plan_image

    return plan_image(processor, _media(picture.convert("RGB")), policy, query)


def features_of(processor: PruningProcessor, picture: Image.Image) -> VisualFeatures:
    """Features of an image."""
    from vllm_vtprune.plugin.image import encode_image

    return encode_image(processor, _media(picture.convert("RGB")))


def _media(picture: Image.Image) -> MediaWithBytes[Image.Image]:
    from vllm.multimodal.media import MediaWithBytes

    return MediaWithBytes(picture, repr(picture.size).encode() + picture.tobytes())  # the bytes that vLLM hashes


def _json_or_name(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

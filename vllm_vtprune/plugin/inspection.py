"""What a policy keeps of an image, without an engine; and the reports of requests to a `vllm.LLM`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from vllm_vtprune import envs
from vllm_vtprune.overlay import draw_kept
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport

# vLLM takes half a minute to import: commands that only name an error of this module do without.
if TYPE_CHECKING:
    from vllm import LLM
    from vllm.multimodal.media import MediaWithBytes

    from vllm_vtprune.cache import BoundedTable
    from vllm_vtprune.features import VisualFeatures
    from vllm_vtprune.plan import PruningPlan
    from vllm_vtprune.plugin.processor import PruningProcessor


@dataclass(frozen=True)
class Inspection:
    """What a policy does to one image.

    Attributes:
        report: the image's report.
        drawn: the image: dropped parts faded, parts that the model never sees hatched.
    """

    report: ImageReport
    drawn: Image.Image


class InspectionFailed(Exception):
    """The image or the model cannot be inspected; the message gives the reason."""


def inspect(
    image: Image.Image, query: str = "", policy: object = "balanced", *, model: str, trust_remote_code: bool = False
) -> Inspection:
    """Select the tokens of an image as a server would, and draw them. Loads the vision encoder and no engine.

    The last model's encoder stays loaded for the next call.

    Args:
        image: the image.
        query: the question that guides the selection.
        policy: a preset's name, or a policy's fields; it has to select tokens.
        model: a directory, or a name on the hub.
        trust_remote_code: whether to run code from the model's repository.

    Raises:
        PolicyError: the policy is invalid, selects no tokens, or needs what the model lacks.
        InspectionFailed: the model cannot be read, or its architecture cannot be pruned.
    """
    parsed = PruningPolicy.parse(policy, param="policy")
    if not parsed.selects:
        raise PolicyError("policy", policy, "a policy that selects tokens")
    return examine(_last_processor(model, trust_remote_code), image, parsed, query)


def examine(processor: PruningProcessor, picture: Image.Image, policy: PruningPolicy, query: str) -> Inspection:
    """`inspect` with a processor.

    Args:
        processor: the model's processor.
        picture: the image.
        policy: a policy that selects tokens.
        query: the conditioning text, if the policy uses it.

    Raises:
        PolicyError: the model's family lacks what the policy needs.
        InspectionFailed: the positions of the model's tokens are not known.
    """
    report, _, _ = plan_of(processor, picture, policy, query)
    assert report.kept is not None
    try:
        return Inspection(report, draw_kept(picture, report.kept))
    except ValueError as error:
        raise InspectionFailed(str(error)) from error


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


@lru_cache(maxsize=1)
def _last_processor(model: str, trust_remote_code: bool) -> PruningProcessor:
    return pruning_processor(model, trust_remote_code=trust_remote_code)


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


class Reports(Mapping[str, RequestReport]):
    """Reports of the requests that an `LLM` was given since this object exists, by request id.

    Requests without an entry `pruning` have none. The oldest are dropped beyond VTPRUNE_REPORT_TABLE_SIZE.

    >>> reports = Reports(llm)
    >>> [output] = llm.generate(prompt)
    >>> reports[output.request_id].kept_tokens

    Args:
        llm: the engine.
    """

    def __init__(self, llm: LLM) -> None:
        from vllm_vtprune.cache import BoundedTable
        from vllm_vtprune.plugin import compat

        self._reports: BoundedTable[str, RequestReport] = BoundedTable(envs.report_table_size())
        compat.watch_requests(llm, self._note)

    def _note(self, request_id: str, engine_input: Any) -> None:
        from vllm_vtprune.plugin.request import REPORT_KEY

        report = engine_input.get(REPORT_KEY) if isinstance(engine_input, Mapping) else None
        if report is not None:
            self._reports.put(request_id, report)

    def __getitem__(self, request_id: str) -> RequestReport:
        report = self._reports.get(request_id)
        if report is None:
            raise KeyError(request_id)
        return report

    def __iter__(self) -> Iterator[str]:
        return iter(self._reports)

    def __len__(self) -> int:
        return len(self._reports)

"""The report of a request: what was done to its images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vllm_vtprune.kept import KeptTokens
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.text import TextFallback

BypassReason = Literal["budget_not_below_tokens", "unsupported_modality", "unsupported_model"]
"""Why an image with a policy was not pruned."""

Placement = Literal["api", "engine"]
"""Where tokens were selected: in the API process, or in the engine's encoder step."""

STAGES = ("text", "encode", "budget", "select")
"""The stages of a plan, in the order in which they run."""


@dataclass(frozen=True)
class ImageReport:
    """One image of a request.

    Attributes:
        method: the requested selection method; ``"none"`` for an image served unpruned.
        visual_tokens: tokens of the image before pruning.
        kept_tokens: tokens that entered prefill.
        energy: share of the encoder features' spectral energy that the budget keeps, in [0, 1]; None if not measured.
        nouns: words of the text that guided the selection.
        text_fallback: why the text did not guide the selection as the policy asks; None if it did, or if the
            method uses no text.
        cached: whether the result of an earlier request was reused.
        bypass_reason: why the image was left unpruned although a policy applies; None if it was pruned, or if no
            policy applies.
        placement: where its tokens were selected; None if none were.
        placement_reason: why not in the engine, where the server would select; None if it did, or need not.
        detail: OpenAI's ``detail`` of the image, if that chose its policy.
        kept: which tokens entered prefill; None unless the request asked for them and tokens were selected.
        border_tokens: tokens of borders that were cropped before encoding; None if the policy crops none.
        duplicate_tokens: tokens dropped as exact duplicates before the budget; None if the policy drops none.
        lossless_reason: why the image was not cropped, or its duplicates not dropped, although the policy says so.
        allotted_tokens: the image's part of a budget for all images of the request; None for other budgets.
    """

    method: str
    visual_tokens: int
    kept_tokens: int
    energy: float | None = None
    nouns: tuple[str, ...] = ()
    text_fallback: TextFallback | None = None
    cached: bool = False
    bypass_reason: BypassReason | None = None
    placement: Placement | None = None
    placement_reason: str | None = None
    detail: str | None = None
    kept: KeptTokens | None = None
    border_tokens: int | None = None
    duplicate_tokens: int | None = None
    lossless_reason: str | None = None
    allotted_tokens: int | None = None

    @classmethod
    def of(
        cls,
        policy: PruningPolicy,
        visual_tokens: int,
        kept_tokens: int,
        reason: BypassReason = "budget_not_below_tokens",
        **measured: Any,
    ) -> ImageReport:
        """The report of an image under its policy; ``reason`` is its `bypass_reason` if no token was dropped."""
        bypassed = policy.enabled and kept_tokens >= visual_tokens
        if bypassed:
            measured |= {"placement": None, "placement_reason": None}
        return cls(policy.method, visual_tokens, kept_tokens, bypass_reason=reason if bypassed else None, **measured)

    def to_json(self) -> dict[str, Any]:
        """The report as clients see it: every attribute, in order."""
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(self)} | {
            "energy": None if self.energy is None else round(self.energy, 6),
            "nouns": list(self.nouns),
            "kept": None if self.kept is None else self.kept.to_json(),
        }


@dataclass(frozen=True)
class StageRun:
    """One run of a stage, for one image or a batch.

    Attributes:
        stage: one of `STAGES`.
        began: wall clock, in nanoseconds.
        seconds: duration.
    """

    stage: str
    began: int
    seconds: float

    @property
    def ended(self) -> int:
        """Wall clock at the end, in nanoseconds."""
        return self.began + int(self.seconds * 1e9)


@dataclass
class RequestReport:
    """All images of one request, in prompt order, and the stages that their plans took.

    Attributes:
        images: the images' reports.
        text_pipeline: pipeline that found the nouns; None if no text was parsed.
        untuned: whether the defaults were calibrated on other families only.
        stages: runs of stages.
        plans: of a producer that was asked for them, the plan of each image, as JSON values; None for images without.
    """

    images: list[ImageReport] = field(default_factory=list)
    text_pipeline: str | None = None
    untuned: bool = False
    stages: list[StageRun] = field(default_factory=list)
    plans: list[dict[str, Any] | None] = field(default_factory=list)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent on each stage that ran."""
        seconds: dict[str, float] = {}
        for run in self.stages:
            seconds[run.stage] = seconds.get(run.stage, 0.0) + run.seconds
        return seconds

    @property
    def pruned(self) -> bool:
        """Whether any image lost a token."""
        return any(image.kept_tokens < image.visual_tokens for image in self.images)

    @property
    def method(self) -> str:
        """The method that removed tokens: ``"none"`` where none did, ``"mixed"`` where images had different ones."""
        methods = {image.method for image in self.images if image.kept_tokens < image.visual_tokens}
        return methods.pop() if len(methods) == 1 else "mixed" if methods else "none"

    @property
    def visual_tokens(self) -> int:
        """Tokens of all images, unpruned."""
        return sum(image.visual_tokens for image in self.images)

    @property
    def kept_tokens(self) -> int:
        """Tokens of all images that entered prefill."""
        return sum(image.kept_tokens for image in self.images)

    def joined(self, other: RequestReport) -> RequestReport:
        """The report of two prompts of one request."""
        return RequestReport(
            [*self.images, *other.images],
            self.text_pipeline or other.text_pipeline,
            self.untuned or other.untuned,
            [*self.stages, *other.stages],
        )

    def add_timings(self, timings: Mapping[str, float]) -> None:
        """Append stages that have just run in sequence; ``timings``: seconds by stage, in order."""
        ended = time.time_ns()
        runs = []
        for stage, seconds in reversed(list(timings.items())):
            runs.append(StageRun(stage, ended - int(seconds * 1e9), seconds))
            ended = runs[-1].began
        self.stages += reversed(runs)

    def to_json(
        self,
        policy: PruningPolicy,
        *,
        preset: str | None = None,
        ttft: float | None = None,
        total: float | None = None,
    ) -> dict[str, Any]:
        """The report as clients see it.

        Args:
            policy: the policy of the request.
            preset: the name of the preset that the policy came from.
            ttft: seconds from the arrival of the request to its first token; None if not measured.
            total: seconds from the arrival of the request to its last token; None if not measured.
        """
        spent = self.timings
        timings = {stage: spent.get(stage) for stage in STAGES} | {"ttft": ttft, "total": total}
        return {
            "method": self.method,
            "preset": preset,
            "budget": policy.budget.model_dump() if policy.enabled else None,
            "text_pipeline": self.text_pipeline,
            "untuned": self.untuned,
            "images": [image.to_json() for image in self.images],
            "timings_ms": {
                stage: None if seconds is None else round(seconds * 1000, 3) for stage, seconds in timings.items()
            },
        }


def in_prompt_order(
    images: Sequence[ImageReport],
    placeholders: Mapping[str, Sequence[Any]],
    policy: PruningPolicy,
    reason: BypassReason = "unsupported_modality",
) -> list[ImageReport]:
    """The reports of all media of a prompt; media other than images are never pruned.

    Args:
        images: reports of the images, in order.
        placeholders: vLLM's placeholder ranges, by modality.
        policy: the request's policy.
        reason: bypass reason of the other media.
    """
    reports = [(place.offset, image) for place, image in zip(placeholders.get("image", ()), images, strict=True)]
    for place in (place for modality, places in placeholders.items() if modality != "image" for place in places):
        reports.append((place.offset, _bypassed(place.get_num_embeds(), policy, reason)))
    return [report for _, report in sorted(reports, key=lambda report: report[0])]


def unpruned_media(
    policies: Sequence[PruningPolicy],
    placeholders: Mapping[str, Sequence[Any]],
    policy: PruningPolicy,
    reason: BypassReason = "unsupported_modality",
    details: Sequence[str | None] = (),
) -> list[ImageReport]:
    """`in_prompt_order` for an unpruned prompt.

    Args:
        policies: the policy of each image that the client sent.
        placeholders: vLLM's placeholder ranges, by modality.
        policy: the request's policy; applies to every image if the model splits or joins the client's images.
        reason: bypass reason of all media.
        details: the ``detail`` that chose the policy of each image; empty: none did.
    """
    counts = [place.get_num_embeds() for place in placeholders.get("image", ())]
    if len(policies) != len(counts):
        policies, details = [policy] * len(counts), ()
    images = [
        _bypassed(count, image_policy, reason, detail)
        for count, image_policy, detail in zip(counts, policies, details or [None] * len(counts), strict=True)
    ]
    return in_prompt_order(images, placeholders, policy, reason)


def _bypassed(count: int, policy: PruningPolicy, reason: BypassReason, detail: str | None = None) -> ImageReport:
    return ImageReport.of(policy, count, count, reason, detail=detail)

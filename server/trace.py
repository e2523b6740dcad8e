"""The record of one request: source of its report, header, usage, metrics, log line and span."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span, StatusCode
from vllm.logger import init_logger
from vllm.tracing import SpanAttributes

from vllm_vtprune import metrics
from vllm_vtprune.policy import OFF, PruningPolicy
from vllm_vtprune.report import RequestReport

HEADER = "x-vtprune"
USAGE_KEY = "vtprune"

logger = init_logger("vllm.vtprune.requests")

_FIELD_NAME = re.compile(r"[a-z_]{1,32}|\d{1,6}")


@dataclass(frozen=True)
class Refusal:
    """A client error, without its message, which may contain client text.

    Attributes:
        route: path of the route.
        code: HTTP status, or the code of an error event.
        kind: type of the error, such as ``BadRequestError``.
        param: path of the field, such as ``messages.0.content.1.pruning.budget``; None if no field is at fault.
    """

    route: str
    code: int
    kind: str
    param: str | None

    @property
    def field(self) -> str | None:
        """The path of the field; keys that cannot be field names become "?"."""
        if self.param is None:
            return None
        return ".".join(key if _FIELD_NAME.fullmatch(key) else "?" for key in self.param.split("."))

    @property
    def reason(self) -> metrics.RefusalReason | None:
        """``policy`` or ``image`` if one of them was refused; None for other errors."""
        keys = (self.param or "").split(".")
        if keys[-1] == "detail" or "pruning" in keys:
            return "policy"
        return "image" if any(key.startswith("image_") or key == "source" for key in keys) else None

    def log(self, request_id: str | None = None, why: str | None = None) -> None:
        """Log one line, without client text except names of fields.

        Args:
            request_id: vLLM's request id; None if there is none.
            why: the problem, without client text.
        """
        logger.info(
            "Request %s to %s refused: %d %s%s%s",
            request_id or "without an id",
            self.route,
            self.code,
            self.kind,
            "" if self.field is None else f", {self.field}",
            "" if why is None else f": {why}",
            extra={
                "pruning": {
                    "request_id": request_id,
                    "outcome": "refused",
                    "route": self.route,
                    "code": self.code,
                    "type": self.kind,
                    "field": self.field,
                    "why": why,
                }
            },
        )


@dataclass
class Trace:
    """Policy, report and times of one request.

    Attributes:
        policy: the request's policy.
        alias_preset: preset of the request's model alias; None if the model is no alias.
        preset: preset name of the policy; None if it is not a preset.
        preset_label: value of the metrics' label ``preset``, of the images' policies.
        report: report of the images; None until they are processed.
        refusal_detail: problem of the policy or an image, without client text.
        unknown_preset: the model alias names an unknown preset.
        request_id: vLLM's request id, once known.
        started: arrival, in seconds of the wall clock, like vLLM's arrival times.
        ttft: seconds to the first token; None if not (yet) known.
        span: OpenTelemetry span; a no-op if tracing is off.
    """

    policy: PruningPolicy = OFF
    alias_preset: str | None = None
    preset: str | None = None
    preset_label: str = metrics.NO_PRESET
    report: RequestReport | None = None
    refusal_detail: str | None = None
    unknown_preset: bool = False
    request_id: str | None = None
    started: float = field(default_factory=time.time)
    ttft: float | None = None
    span: Span = INVALID_SPAN
    _labels: set[str] = field(default_factory=set)
    _finished: bool = False

    def add(self, report: RequestReport) -> None:
        """Add the report of one of the request's conversations."""
        self.report = report if self.report is None else self.report.joined(report)

    def to_json(self, report: RequestReport | None = None) -> dict[str, Any]:
        """The report in the response; ``report``: of one conversation, None: of all."""
        report = report or self.report or RequestReport()
        return report.to_json(self.policy, preset=self.preset, ttft=self.ttft, total=time.time() - self.started)

    def header(self) -> str:
        """The report's header, an RFC 9651 dictionary: ``method=resprune, images=2, visual=1152, kept=214``."""
        report = self.report or RequestReport()
        fields: dict[str, object] = {"method": report.method}
        if self.images_preset is not None:
            fields["preset"] = self.images_preset
        fields |= {"images": len(report.images), "visual": report.visual_tokens, "kept": report.kept_tokens}
        return ", ".join(f"{name}={value}" for name, value in fields.items())

    @property
    def images_preset(self) -> str | None:
        """The preset of all images; ``mixed`` if their policies differ, None if no preset was used."""
        return None if self.preset_label in (metrics.CUSTOM, metrics.NO_PRESET) else self.preset_label

    def usage(self) -> dict[str, int] | None:
        """The entry in ``usage.prompt_tokens_details``; None for a request without images."""
        if self.report is None or not self.report.images:
            return None
        return {"visual_tokens": self.report.visual_tokens, "kept_tokens": self.report.kept_tokens}

    def note_preset(self, labels: Collection[str]) -> None:
        """Set `preset_label`.

        Args:
            labels: preset labels of the policies of a conversation's images.
        """
        self._labels |= set(labels)
        self.preset_label = metrics.MIXED if len(self._labels) > 1 else next(iter(self._labels))

    def finish(self, outcome: metrics.Outcome, model_name: str, refusal: Refusal | None = None) -> None:
        """Count and log the outcome and end the span, once; later calls do nothing.

        Args:
            outcome: the outcome.
            model_name: label of the metrics.
            refusal: the refusal, for outcome ``refused``.
        """
        if self._finished:
            return
        self._finished = True
        reason = "policy" if self.unknown_preset else refusal.reason if refusal is not None else None
        preset = metrics.INVALID if reason == "policy" else self.preset_label
        metrics.REQUESTS.labels(model_name, outcome, preset).inc()
        if outcome == "finished":
            self._count_images(model_name)
        if refusal is not None:
            if reason is not None:
                metrics.ERRORS.labels(model_name, reason).inc()
            refusal.log(self.request_id, self.refusal_detail)
        elif self.report is not None and self.report.pruned:
            self._log(self.report, outcome)
        if self.span.is_recording():
            self._end_span(outcome)

    def _count_images(self, model_name: str) -> None:
        if self.report is None or not self.report.images:
            return
        for image in self.report.images:
            labels = model_name, image.method
            metrics.VISUAL_TOKENS.labels(*labels, self.preset_label).inc(image.visual_tokens)
            metrics.VISUAL_TOKENS_KEPT.labels(*labels, self.preset_label).inc(image.kept_tokens)
            metrics.KEEP_RATIO.labels(*labels).observe(image.kept_tokens / image.visual_tokens)
            if image.placement is not None:
                metrics.IMAGES.labels(model_name, image.placement).inc()
            if image.bypass_reason is not None:
                metrics.BYPASS.labels(model_name, image.bypass_reason).inc()
        if self.ttft is not None:
            band = metrics.keep_ratio_band(self.report.kept_tokens, self.report.visual_tokens)
            metrics.TIME_TO_FIRST_TOKEN.labels(model_name, self.report.method, band).observe(self.ttft)

    def _log(self, report: RequestReport, outcome: str) -> None:
        """Log one line without client text; ``extra`` holds the values for JSON formatters."""
        timings: dict[str, float | None] = self.to_json()["timings_ms"]
        cached = sum(image.cached for image in report.images)
        logger.info(
            "Request %s %s: %s kept %d of %d visual tokens of %d image(s), %d cached; ms: %s",
            self.request_id,
            outcome,
            report.method,
            report.kept_tokens,
            report.visual_tokens,
            len(report.images),
            cached,
            " ".join(f"{stage}={ms}" for stage, ms in timings.items() if ms is not None),
            extra={
                "pruning": {
                    "request_id": self.request_id,
                    "outcome": outcome,
                    "method": report.method,
                    "preset": self.images_preset,
                    "images": len(report.images),
                    "visual_tokens": report.visual_tokens,
                    "kept_tokens": report.kept_tokens,
                    "cached_images": cached,
                    "timings_ms": timings,
                }
            },
        )

    def _end_span(self, outcome: str) -> None:
        if self.request_id is not None:
            self.span.set_attribute(SpanAttributes.GEN_AI_REQUEST_ID, self.request_id)
        if self.report is not None:
            self.span.set_attribute("vtprune.method", self.report.method)
            self.span.set_attribute("vtprune.visual_tokens", self.report.visual_tokens)
            self.span.set_attribute("vtprune.kept_tokens", self.report.kept_tokens)
        self.span.set_attribute("vtprune.outcome", outcome)
        if outcome == "failed":
            self.span.set_status(StatusCode.ERROR)
        self.span.end()

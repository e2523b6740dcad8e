"""What is known of one request on its way; the report, its short forms, the metrics and the log line come from here."""

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
    """The error that a client got, without its message, which repeats what the client sent.

    Attributes:
        route: path of the route that was asked.
        code: HTTP status, or what takes its place in an event stream.
        kind: the type of the error, such as ``BadRequestError``.
        param: the path of the field, such as ``messages.0.content.1.pruning.budget``; None if it is about none.
    """

    route: str
    code: int
    kind: str
    param: str | None

    @property
    def field(self) -> str | None:
        """The path of the field; what cannot be the name of one is not repeated."""
        if self.param is None:
            return None
        return ".".join(key if _FIELD_NAME.fullmatch(key) else "?" for key in self.param.split("."))

    @property
    def reason(self) -> metrics.RefusalReason | None:
        """Which part of the request was refused, as far as it is ours; None for what stock vLLM would refuse too."""
        keys = (self.param or "").split(".")
        if "pruning" in keys:
            return "policy"
        return "image" if any(key.startswith("image_") for key in keys) else None

    def log(self, request_id: str | None = None, why: str | None = None) -> None:
        """One line, without anything that the client wrote but the names of fields.

        Args:
            request_id: vLLM's; None where it has none.
            why: what is wrong with the field; nothing that the client wrote.
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
    """A request's policy, its report so far, and when things happened (seconds).

    Attributes:
        policy: the policy of the request.
        alias_preset: the preset of the model name that the client wrote; None where it was no alias.
        preset: the name under which it was asked for.
        preset_label: of its metrics.
        report: what was done to the images; None until they were processed.
        why_refused: what is wrong with its policy or one of its images; nothing that the client wrote.
        unknown_preset: it was refused for a preset that its model name asks for.
        request_id: vLLM's, as far as it is known.
        started: when it arrived, by the wall clock as vLLM's arrival times.
        ttft: from then to the first token; None if not known (yet).
        span: OpenTelemetry's; one that records nothing where tracing is off.
    """

    policy: PruningPolicy = OFF
    alias_preset: str | None = None
    preset: str | None = None
    preset_label: str = metrics.NO_PRESET
    report: RequestReport | None = None
    why_refused: str | None = None
    unknown_preset: bool = False
    request_id: str | None = None
    started: float = field(default_factory=time.time)
    ttft: float | None = None
    span: Span = INVALID_SPAN
    _finished: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as it stands in the response."""
        report = self.report or RequestReport()
        return report.to_json(self.policy, preset=self.preset, ttft=self.ttft, total=time.time() - self.started)

    def header(self) -> str:
        """The report in short, a dictionary of RFC 9651: ``method=resprune, images=2, visual=1152, kept=214``."""
        report = self.report or RequestReport()
        fields: dict[str, object] = {"method": report.method}
        if self.preset is not None:
            fields["preset"] = self.preset
        fields |= {"images": len(report.images), "visual": report.visual_tokens, "kept": report.kept_tokens}
        return ", ".join(f"{name}={value}" for name, value in fields.items())

    def usage(self) -> dict[str, int] | None:
        """The block in ``usage.prompt_tokens_details``; None for a request without images."""
        if self.report is None or not self.report.images:
            return None
        return {"visual_tokens": self.report.visual_tokens, "kept_tokens": self.report.kept_tokens}

    def note_preset(self, asked: Collection[str]) -> None:
        """Have the metrics of the request say which preset its images follow.

        Args:
            asked: labels of the policies of its images.
        """
        labels = set(asked)
        self.preset_label = labels.pop() if len(labels) == 1 else metrics.MIXED

    def finish(self, outcome: metrics.Outcome, model_name: str, refusal: Refusal | None = None) -> None:
        """Count and log what became of the request and end its span; later calls do nothing.

        Args:
            outcome: what the client got.
            model_name: label of the metrics.
            refusal: what was wrong with a request that was refused.
        """
        if self._finished:
            return
        self._finished = True
        metrics.REQUESTS.labels(model_name, outcome, self.preset_label).inc()
        if outcome == "finished":
            self._count_images(model_name)
        if refusal is not None:
            reason = "policy" if self.unknown_preset else refusal.reason
            if reason is not None:
                metrics.ERRORS.labels(model_name, reason).inc()
            refusal.log(self.request_id, self.why_refused)
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
        """One line, without any of the request's text; formatters of JSON get the values one by one."""
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
                    "preset": self.preset,
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

"""What is known of one request on its way; the report, its short forms, the metrics and the log line come from here."""

from __future__ import annotations

import time
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


@dataclass
class Trace:
    """A request's policy, its report so far, and when things happened (seconds).

    Attributes:
        policy: the policy of the request.
        preset: the name under which it was asked for.
        report: what was done to the images; None until they were processed.
        request_id: vLLM's; None until the engine got the request.
        started: when it arrived, by the wall clock as vLLM's arrival times.
        ttft: from then to the first token; None if not known (yet).
        span: OpenTelemetry's; one that records nothing where tracing is off.
    """

    policy: PruningPolicy = OFF
    preset: str | None = None
    report: RequestReport | None = None
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

    def note_first_token(self, seconds: float, model_name: str) -> None:
        """Record when the first token came, once.

        Args:
            seconds: since the request arrived.
            model_name: label of the metric.
        """
        self.ttft = seconds
        if self.report is not None and self.report.images:
            band = metrics.keep_ratio_band(self.report.kept_tokens, self.report.visual_tokens)
            metrics.TIME_TO_FIRST_TOKEN.labels(model_name, self.report.method, band).observe(seconds)

    def finish(self, outcome: metrics.Outcome, model_name: str) -> None:
        """Count and log what became of the request and end its span; later calls do nothing.

        Args:
            outcome: of the request.
            model_name: label of the metric.
        """
        if self._finished:
            return
        self._finished = True
        metrics.REQUESTS.labels(model_name, outcome).inc()
        if self.report is not None and self.report.pruned:
            self._log(self.report, outcome)
        if self.span.is_recording():
            self._end_span(outcome)

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

"""OpenTelemetry spans of requests, through vLLM's tracer provider (``--otlp-traces-endpoint``).

One span per request, child of the caller's ``traceparent``; its children are one span per run of a stage, and vLLM's
``llm_request``. No-ops without tracing.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.trace import SpanKind, Tracer, get_tracer
from vllm.tracing import extract_trace_context

from vllm_vtprune.report import RequestReport
from vllm_vtprune_server.trace import Trace

REQUEST_SPAN = "chat_completion"
STAGE_PREFIX = "vtprune."


def start_request_span(trace: Trace, headers: Mapping[str, str]) -> None:
    """Start a request's span at its arrival, in its ``trace``; `Trace.finish` ends it."""
    trace.span = _tracer().start_span(
        REQUEST_SPAN,
        context=extract_trace_context(headers),
        kind=SpanKind.SERVER,
        start_time=int(trace.started * 1e9),
    )


def record_stages(report: RequestReport) -> None:
    """Record the stages that ran as children of the current span."""
    for run in report.stages:
        _tracer().start_span(STAGE_PREFIX + run.stage, start_time=run.began).end(run.ended)


def _tracer() -> Tracer:
    return get_tracer("vllm_vtprune")

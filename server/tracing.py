"""OpenTelemetry spans of chat completions, through the tracer provider that vLLM sets up (``--otlp-traces-endpoint``).

One span for the request, below the caller's if it sent a ``traceparent``; below it one for each run of a stage, and
vLLM's own ``llm_request``. Without tracing they are OpenTelemetry's no-ops.
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
    """Begin the span of a request at its arrival; `Trace.finish` ends it.

    Args:
        trace: of the request; gets the span.
        headers: of the HTTP request.
    """
    trace.span = _tracer().start_span(
        REQUEST_SPAN,
        context=extract_trace_context(headers),
        kind=SpanKind.SERVER,
        start_time=int(trace.started * 1e9),
    )


def record_stages(report: RequestReport) -> None:
    """Spans of the stages that ran, below the current span."""
    for run in report.stages:
        _tracer().start_span(STAGE_PREFIX + run.stage, start_time=run.began).end(run.ended)


def _tracer() -> Tracer:
    return get_tracer("vllm_vtprune")

"""An OpenTelemetry collector for tests: takes OTLP over HTTP and keeps the spans."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Collector:
    endpoint: str
    spans: list[Span] = field(default_factory=list)

    def attributes_of(self, span: Span) -> dict[str, object]:
        return {
            attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value"))
            for attribute in span.attributes
        }


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Listen on a free port of this machine while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            scopes = [scope for resource in message.resource_spans for scope in resource.scope_spans]
            collector.spans.extend(span for scope in scopes for span in scope.spans)
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        collector = Collector(f"http://127.0.0.1:{http.server_port}/v1/traces")
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            http.shutdown()
            thread.join()

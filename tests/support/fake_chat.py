"""A chat server that answers what a test tells it to: real HTTP, with every byte and pause under control."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

MODEL = "fake"


@dataclass(frozen=True)
class Reply:
    """What is sent.

    Attributes:
        parts: bytes, each sent as one HTTP chunk, and numbers: seconds of silence.
        status: of the response.
        cut: whether the connection is closed without the end that HTTP asks for.
        content_type: of the parts.
    """

    parts: tuple[bytes | float, ...]
    status: int = 200
    cut: bool = False
    content_type: str = "text/event-stream"


@dataclass
class FakeChat:
    """The server's address, the bodies of the requests that it got, and the model that it says it has loaded."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    root: str = MODEL


@contextmanager
def fake_chat(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[FakeChat]:
    """Run the server; `reply` gets the body of each chat completion."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.dumps({"object": "list", "data": [{"id": MODEL, "root": fake.root}]}).encode()
            self.send_response(200 if self.path in ("/v1/models", "/health") else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fake.bodies.append(body)
            answer = reply(body)
            self.send_response(answer.status)
            self.send_header("content-type", answer.content_type)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for part in answer.parts:
                if isinstance(part, bytes):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                else:
                    time.sleep(part)
            if answer.cut:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class FakeServer(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # connections at the same moment, none of which has to try again

    with FakeServer(("127.0.0.1", 0), Handler) as server:
        fake = FakeChat(f"http://127.0.0.1:{server.server_address[1]}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


def event(data: object) -> bytes:
    """A server-sent event, as vLLM writes it."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def token(text: str | None, finish: str | None = None, **delta: Any) -> bytes:
    """A chunk with this content; None: without content."""
    content = {} if text is None else {"content": text}
    return event({"choices": [{"index": 0, "delta": {**delta, **content}, "finish_reason": finish}]})


def usage(prompt: int = 100, completion: int = 3, **more: Any) -> bytes:
    """The chunk that ends a stream whose request asks for it."""
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}, **more})


def report(kept: int, of: int = 576) -> dict[str, Any]:
    """The part of the server's report that a record reads."""
    return {"method": "resprune", "images": [{"visual_tokens": of, "kept_tokens": kept}]}


ROLE = token("", role="assistant")
DONE = b"data: [DONE]\n\n"

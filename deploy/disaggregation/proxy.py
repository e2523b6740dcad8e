"""Proxy for encoder disaggregation: a producer encodes and prunes a request's media, then a consumer answers.

The consumer gets the request with the producer's plans: which tokens it kept of each image.

    python deploy/disaggregation/proxy.py --encoders http://localhost:8001 --decoders http://localhost:8002

Copy the file to where it has to run: it imports nothing from this project. It needs fastapi, httpx and uvicorn, which
vLLM brings.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from itertools import count
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

logger = logging.getLogger("uvicorn.error")

CHAT = "/v1/chat/completions"
CONNECT_TIMEOUT = 3.0  # seconds
MEDIA = frozenset({"image_url", "video_url", "audio_url", "input_audio"})
"""Keys of content parts with media to encode."""
PLANS = "pruning_plans"
"""Field that asks a producer for its plans, and brings them to a consumer. No client may write it."""

ENCODED = (
    *("model", "messages", "pruning", "mm_processor_kwargs", "media_io_kwargs"),
    *("chat_template", "chat_template_kwargs"),
)
"""Fields of a request that decide what is encoded; the others concern the answer."""

HOP_BY_HOP = frozenset(
    (
        *("connection", "expect", "host", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    )
)
OF_THE_BODY = frozenset({"content-length", "content-type", "content-encoding", "accept-encoding"})


class Instances:
    """Servers of one role, which the errors name, by their base URLs."""

    def __init__(self, role: str, urls: Sequence[str]) -> None:
        self.role = role
        self._urls = [url.rstrip("/") for url in urls]
        self._requests = count()

    def in_turn(self) -> list[str]:
        """All of them, beginning with the next: the order in which to try them for one request."""
        first = next(self._requests) % len(self._urls)
        return self._urls[first:] + self._urls[:first]

    def unavailable(self, problems: Sequence[str]) -> Response:
        """The answer to a request that none of them could serve, in OpenAI's form; ``problems`` name the servers."""
        message = f"no {self.role} available: {'; '.join(problems)}"
        logger.warning(message)
        error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
        return JSONResponse({"error": error}, 503)


class Proxy:
    """Sends media to producers and requests to consumers.

    Args:
        encoders: base URLs of the producers.
        decoders: base URLs of the consumers.
        encode_timeout: seconds in which a request's media have to be encoded, over all producers tried.
        transport: of HTTP, for tests.
    """

    def __init__(
        self,
        encoders: Sequence[str],
        decoders: Sequence[str],
        encode_timeout: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._encoders = Instances("encoder", encoders)
        self._decoders = Instances("decoder", decoders)
        self._encode_timeout = encode_timeout
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
            # a connection for each request: none outlives a restart of the server
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion."""
        body = await request.body()
        return await _while_connected(request, self._chat(request, body))

    async def get(self, request: Request) -> Response:
        """Answer what a consumer answers."""
        return await _while_connected(request, self._forward(request, b""))

    async def _chat(self, request: Request, body: bytes) -> Response:
        fields = read(body)
        to_encode = encoder_request(fields)
        plans = [] if to_encode is None else await self._encode(to_encode, request.headers)
        if isinstance(plans, Response):
            return plans
        changed = consumer_request(fields, plans)
        return await self._forward(request, body if changed is None else json.dumps(changed).encode())

    async def _encode(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response | list[Any]:
        """Have a producer encode; its plans, or the answer for the client if there is no producer."""
        passed = {name: value for name, value in headers.items() if name not in HOP_BY_HOP | OF_THE_BODY}
        passed["accept-encoding"] = "identity"
        problems, url = [], ""
        try:
            async with asyncio.timeout(self._encode_timeout):
                for url in self._encoders.in_turn():
                    try:
                        answer = await self._client.post(url + CHAT, json=body, headers=passed)
                    except httpx.TransportError as error:
                        problems.append(f"{url} failed with {type(error).__name__}")
                        continue
                    if answer.is_success:
                        plans: list[Any] = read(answer.content).get(PLANS, [])
                        return plans
                    if answer.status_code < 500:
                        return Response(answer.content, answer.status_code, _end_to_end(answer.headers))
                    problems.append(f"{url} answered with status {answer.status_code}")
        except TimeoutError:
            problems.append(f"{url} did not answer; media have to be encoded within {self._encode_timeout:g} s")
        return self._encoders.unavailable(problems)

    async def _forward(self, request: Request, body: bytes) -> Response:
        """The answer of a consumer to the client's request, byte for byte."""
        headers = {"accept-encoding": "identity", **_end_to_end(request.headers)}
        headers.pop("content-length", None)  # that of the body may differ
        problems = []
        for url in self._decoders.in_turn():
            target = f"{url}{request.url.path}?{request.url.query}".rstrip("?")
            outgoing = self._client.build_request(request.method, target, content=body, headers=headers)
            try:
                answer = await self._client.send(outgoing, stream=True)
            except httpx.TransportError as error:
                problems.append(f"{url} failed with {type(error).__name__}")
                if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    continue
                break  # it may have begun to answer
            return StreamingResponse(_relay(answer), answer.status_code, _end_to_end(answer.headers))
        return self._decoders.unavailable(problems)


def read(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object; empty for anything else, which a consumer refuses."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def encoder_request(request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The request that makes a producer encode the media of a chat completion.

    None for a request without media, and for a malformed one, which a consumer refuses.
    """
    try:
        contents = [message["content"] for message in request["messages"] if isinstance(message.get("content"), list)]
        if not any(isinstance(part, dict) and part.keys() & MEDIA for content in contents for part in content):
            return None
    except (TypeError, KeyError, AttributeError):
        return None
    return {**{name: request[name] for name in ENCODED if name in request}, PLANS: True, "max_tokens": 1}


def consumer_request(request: Mapping[str, Any], plans: Sequence[Any]) -> dict[str, Any] | None:
    """The request for a consumer, with a producer's plans and without those of the client; None: the client's own.

    Args:
        request: the client's.
        plans: one for each image, or null; empty if the producer made none.
    """
    fields = {name: value for name, value in request.items() if name != PLANS}
    if any(plans):
        return {**fields, PLANS: plans}
    return fields if PLANS in request else None


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in HOP_BY_HOP}


async def _relay(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work; cancel it if the client leaves, so that the servers stop, too."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=499)
    finally:
        answering.cancel()
        leaving.cancel()


def make_app(proxy: Proxy) -> FastAPI:
    """The proxy's routes."""
    app = FastAPI(title="Encoder disaggregation")
    app.add_api_route(CHAT, proxy.chat, methods=["POST"], response_model=None)
    for path in ("/v1/models", "/v1/models/{name:path}", "/v1/pruning", "/health"):
        app.add_api_route(path, proxy.get, methods=["GET"], response_model=None)
    return app


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Proxy for encoder disaggregation")
    parser.add_argument(
        "--encoders", nargs="+", required=True, metavar="URL", help="instances with ec_role ec_producer"
    )
    parser.add_argument(
        "--decoders", nargs="+", required=True, metavar="URL", help="instances with ec_role ec_consumer"
    )
    parser.add_argument(
        "--encode-timeout", type=float, default=60.0, metavar="S", help="seconds to encode (%(default)g)"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    app = make_app(Proxy(options.encoders, options.decoders, options.encode_timeout))
    uvicorn.run(app, host=options.host, port=options.port, access_log=False)


if __name__ == "__main__":
    main()

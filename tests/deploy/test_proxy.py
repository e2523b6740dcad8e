"""The proxy for encoder disaggregation, before pretended servers."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from deploy.disaggregation.proxy import PLANS, Proxy, encoder_request, make_app
from tests.support.chat import Body, image_part, user
from vllm_vtprune_server.process import free_port

CHAT = "/v1/chat/completions"
PICTURE = "data:image/png;base64,AAAA"
ASK: Body = {"model": "m", "messages": [user("Where is the dog?", PICTURE)], "pruning": "fast"}
PARTS = (b'data: {"a": 1}\n\n', b"data: [DO", b"NE]\n\n")
Answer = Callable[[httpx.Request], httpx.Response]


class Parts(httpx.AsyncByteStream):
    """A body in parts; `closed` tells whether the reader let go of it."""

    def __init__(self, parts: Sequence[bytes] = PARTS, *, endless: bool = False) -> None:
        self.parts, self.endless, self.closed = parts, endless, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part
        if self.endless:
            await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class Instances:
    """Two producers, two consumers, what each answers, and what each was asked."""

    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, httpx.Request]] = field(default_factory=list)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.asked.append((host, request))
        answer = self.answers.get(host, lambda _: httpx.Response(200, json={"from": host}))(request)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=answer.stream)

    @property
    def hosts(self) -> list[str]:
        return [host for host, _ in self.asked]


@pytest.fixture
def instances() -> Instances:
    return Instances()


def send(
    instances: Instances | None,
    *bodies: Mapping[str, Any] | bytes,
    headers: Mapping[str, str] | None = None,
    encoders: Sequence[str] = ("http://p1", "http://p2/"),
    encode_timeout: float = 5,
) -> list[httpx.Response]:
    """The proxy's answers to chat completions, one after the other."""
    transport = None if instances is None else httpx.MockTransport(instances.answer)
    app = make_app(Proxy(encoders, ["http://c1", "http://c2"], encode_timeout, transport))

    async def all_answers() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
            contents = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
            return [await client.post(CHAT, content=content, headers=headers) for content in contents]

    return asyncio.run(all_answers())


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def test_producers_and_consumers_take_turns(instances: Instances) -> None:
    answers = send(instances, ASK, ASK, ASK)
    assert instances.hosts == ["p1", "c1", "p2", "c2", "p1", "c1"]
    assert [answer.json()["from"] for answer in answers] == ["c1", "c2", "c1"]


def test_a_producer_gets_what_decides_the_encoding_and_a_consumer_gets_every_byte(instances: Instances) -> None:
    options = {"mm_processor_kwargs": {"a": 1}, "stream": True, "n": 4, "min_tokens": 9, "max_completion_tokens": 50}
    body = json.dumps({**options, **ASK, "tools": [{}], "stream_options": {"include_usage": True}}, indent=3).encode()
    headers = {"authorization": "Bearer key", "x-request-id": "7", "content-type": "application/json; charset=utf-8"}
    send(instances, body, headers=headers)
    (_, encode), (_, forward) = instances.asked
    assert json.loads(encode.content) == {**ASK, "mm_processor_kwargs": {"a": 1}, PLANS: True, "max_tokens": 1}
    assert forward.content == body
    assert encode.headers["content-type"] == "application/json"
    for name, value in headers.items():
        assert forward.headers[name] == value
        assert name == "content-type" or encode.headers[name] == value
    assert [request.headers["host"] for _, request in instances.asked] == ["p1", "c1"]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_stream_passes_byte_for_byte(instances: Instances, compressed: bool) -> None:
    parts = [gzip.compress(b"".join(PARTS))] if compressed else PARTS
    headers = {"content-type": "text/event-stream", "x-vtprune": "kept=3"}
    headers |= {"content-encoding": "gzip"} if compressed else {}
    instances.answers["c1"] = lambda _: httpx.Response(201, stream=Parts(parts), headers=headers)
    (answer,) = send(instances, {**ASK, "stream": True})
    assert answer.content == b"".join(PARTS)
    assert answer.status_code == 201
    assert headers.items() <= dict(answer.headers).items()


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Where?"}]},
        {"messages": [user("Where?")], "pruning": "fast"},
        {"messages": 3},
        {"messages": [None]},
        {},
        b"[]",
        b"{",
        b"\xff",
    ],
    ids=str,
)
def test_requests_without_media_and_malformed_ones_go_to_a_consumer_alone(
    instances: Instances, body: Body | bytes
) -> None:
    send(instances, body)
    assert instances.hosts == ["c1"]


@pytest.mark.parametrize(
    "part",
    [
        image_part(PICTURE),
        {"image_url": PICTURE},
        {"type": "input_image", "image_url": PICTURE},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    ],
)
def test_media_in_every_form_are_encoded(part: Body) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ["Look: ", part]}]
    assert encoder_request({"messages": messages}) == {"messages": messages, PLANS: True, "max_tokens": 1}


PLAN: Body = {"kept": {"runs": [[0, 3], [9, 1]]}}


@pytest.mark.parametrize("written", [None, [PLAN], True], ids=["nothing", "a plan", "a question"])
def test_a_consumer_gets_the_producer_s_plans_and_no_client_s(instances: Instances, written: object) -> None:
    body = {**ASK, "temperature": 0.1, "stop": "\ud83d", **({} if written is None else {PLANS: written})}
    instances.answers["p1"] = lambda _: httpx.Response(200, json={PLANS: [None, PLAN]})
    instances.answers["p2"] = lambda _: httpx.Response(200, json={PLANS: [None]})
    send(instances, body, body, {**body, "messages": [{"role": "user", "content": "Where?"}]})
    forwarded = [json.loads(request.content) for host, request in instances.asked if host.startswith("c")]
    asked = [json.loads(request.content)[PLANS] for host, request in instances.asked if host.startswith("p")]
    assert asked == [True, True]
    assert [request.pop(PLANS, None) for request in forwarded] == [[None, PLAN], None, None]
    own = {name: value for name, value in body.items() if name != PLANS}
    assert forwarded == [own, own, {**own, "messages": forwarded[2]["messages"]}]
    for _, request in instances.asked:
        assert int(request.headers["content-length"]) == len(request.content)


def test_a_producer_s_refusal_is_the_answer(instances: Instances) -> None:
    error = b'{"error": {"message": "pruning.methd: unknown field", "code": 400}}'
    refused = httpx.Response(400, content=error, headers={"content-type": "application/json", "x-vtprune": "no"})
    instances.answers["p1"] = lambda _: refused
    (answer,) = send(instances, ASK)
    assert (answer.status_code, answer.content, answer.headers["x-vtprune"]) == (400, error, "no")
    assert instances.hosts == ["p1"]


@pytest.mark.parametrize("broken", [refuse, lambda _: httpx.Response(500)], ids=["refuses", "fails"])
def test_another_producer_takes_the_place_of_a_broken_one(instances: Instances, broken: Answer) -> None:
    instances.answers["p1"] = broken
    assert [answer.status_code for answer in send(instances, ASK)] == [200]
    assert instances.hosts == ["p1", "p2", "c1"]


def test_without_a_producer_the_answer_is_503_until_one_is_back(instances: Instances) -> None:
    broken = iter([refuse, refuse])
    instances.answers["p1"] = lambda request: next(broken, lambda _: httpx.Response(200))(request)
    first, second, third = send(instances, ASK, ASK, ASK, encoders=["http://p1"])
    for answer in (first, second):
        assert answer.status_code == 503
        assert answer.json()["error"] == {
            "message": "no encoder available: http://p1 failed with ConnectError",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
    assert third.status_code == 200
    assert instances.hosts == ["p1", "p1", "p1", "c1"]


def test_nobody_at_a_port_is_503() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    (answer,) = send(None, ASK, encoders=[url])
    assert answer.status_code == 503
    assert f"{url} failed with ConnectError" in answer.json()["error"]["message"]


def test_a_producer_that_hangs_is_503_after_the_time_limit() -> None:
    async def hang(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    hanging = Instances()
    hanging.answer = hang  # type: ignore[method-assign]
    (answer,) = send(hanging, ASK, encode_timeout=0.2)
    assert answer.status_code == 503
    assert "http://p1 did not answer; media have to be encoded within 0.2 s" in answer.json()["error"]["message"]


def test_another_consumer_is_asked_only_if_the_first_got_nothing(instances: Instances) -> None:
    instances.answers["c1"] = refuse
    assert send(instances, ASK)[0].json() == {"from": "c2"}

    def cut(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("cut", request=request)

    instances.answers["c1"] = cut
    (answer,) = send(instances, ASK)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "no decoder available: http://c1 failed with ReadError"
    assert instances.hosts == ["p1", "c1", "c2", "p1", "c1"]


def test_a_consumer_s_error_is_the_answer(instances: Instances) -> None:
    instances.answers["c1"] = lambda _: httpx.Response(500, json={"error": {"code": 500}})
    (answer,) = send(instances, ASK)
    assert (answer.status_code, answer.json()) == (500, {"error": {"code": 500}})
    assert instances.hosts == ["p1", "c1"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m@fast", "/v1/pruning?method=uniform", "/health"])
def test_what_a_server_tells_of_itself_a_consumer_tells(instances: Instances, path: str) -> None:
    app = make_app(Proxy(["http://p1"], ["http://c1"], 5, httpx.MockTransport(instances.answer)))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
            return await client.get(path)

    assert asyncio.run(ask()).json() == {"from": "c1"}
    ((_, request),) = instances.asked
    assert (request.method, str(request.url)) == ("GET", f"http://c1{path}")


@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "within the stream"])
def test_a_client_that_leaves_ends_the_request(begun: bool) -> None:
    stream, cancelled = Parts(endless=True), []

    async def answer(request: httpx.Request) -> httpx.Response:
        if begun or request.url.host == "p1":
            return httpx.Response(200, stream=stream if request.url.host == "c1" else Parts(()))
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)
        raise AssertionError

    app = make_app(Proxy(["http://p1"], ["http://c1"], 5, httpx.MockTransport(answer)))

    async def ask_and_leave() -> None:
        asked, left = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not asked.is_set():
                asked.set()
                return {"type": "http.request", "body": json.dumps(ASK).encode()}
            if not begun:
                await asyncio.sleep(0.1)
                left.set()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, Any]) -> None:
            if message.get("body") == PARTS[-1]:
                left.set()

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": [], "scheme": "http"}
        scope |= {"server": ("proxy", 80), "asgi": {"version": "3.0"}}
        async with asyncio.timeout(5):
            await app(scope, receive, send)

    asyncio.run(ask_and_leave())
    assert stream.closed if begun else cancelled

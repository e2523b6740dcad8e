"""A policy that is sent to a route which does not prune is refused there, and not ignored."""

import json

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from tests.support.chat import Body, Server, fresh_url, image_part, user
from vllm_vtprune_server.elsewhere import MisplacedPolicyMiddleware, json_routes, misplaced_policy
from vllm_vtprune_server.outcome import PRUNING, ROUTE

POLICIES: dict[str, tuple[Body, str | None]] = {
    "a preset": ({"pruning": "fast"}, "pruning"),
    "false": ({"pruning": False}, "pruning"),
    "no policy": ({"pruning": 5}, "pruning"),
    "null": ({"pruning": None}, None),
    "vLLM's way in": ({"mm_processor_kwargs": {"pruning": {}}}, "mm_processor_kwargs.pruning"),
    "beside an image": (
        {"messages": [user("Hello."), user("Where?", image_part("data:", pruning="fast"))]},
        "messages.1.content.0.pruning",
    ),
    "beside an image of a batch": (
        {"messages": [[user("Hello.")], [user("Where?", image_part("data:", pruning="fast"))]]},
        "messages.1.0.content.0.pruning",
    ),
    "beside an image of a response": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "pruning": "fast"}]}]},
        "input.0.content.0.pruning",
    ),
    "misspelt": ({"prunning": "fast"}, "prunning"),
    "an argument of the client": ({"extra_body": {"pruning": "fast"}}, "extra_body.pruning"),
    "inside of a URL": (
        {"messages": [user("Where?", {"type": "image_url", "image_url": {"url": "data:", "pruning": "fast"}})]},
        "messages.0.content.0.image_url.pruning",
    ),
    "a field of a tool": ({"tools": [{"function": {"parameters": {"properties": {"pruning": {}}}}}]}, None),
    "a text about it": ({"messages": [user('"pruning": "fast"')], "prompt": '"pruning"'}, None),
    "none": ({"messages": [user("Where?")], "input": "Where?", "mm_processor_kwargs": None}, None),
}


@pytest.mark.parametrize(("body", "param"), POLICIES.values(), ids=POLICIES.keys())
def test_where_a_policy_stands(body: Body, param: str | None) -> None:
    assert misplaced_policy(json.dumps(body).encode()) == param


@pytest.mark.parametrize(
    "body", [b'["pruning"]', b'{"pruning": ', b'"pruning"', b"[" * 100_000 + b'"pruning"', b"\xff"]
)
def test_what_is_no_object_holds_none(body: bytes) -> None:
    assert misplaced_policy(body) is None


@pytest.mark.parametrize(("begin", "end"), [(b"[", b"]"), (b'{"content": ', b"}")], ids=["lists", "contents"])
def test_a_body_nested_too_deep_to_search_holds_none(begin: bytes, end: bytes) -> None:
    """The first depths are those that Python 3.11 reads, and may be too deep to search."""
    for depth in (*range(700, 1000), 1500):
        body = b'{"messages": ' + begin * depth + b"null" + end * depth + b', "x": "prun"}'
        assert misplaced_policy(body) is None


@pytest.mark.parametrize("body", [b'{"prunin\\u0067": "fast"}', '{"pruning": 1}'.encode("utf-16")])
def test_no_spelling_of_json_hides_it(client: TestClient, body: bytes) -> None:
    refused = client.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "pruning")


@pytest.fixture
def client() -> TestClient:
    """An app with a route of vLLM, ours, and one of another plugin."""
    app = FastAPI()
    stock, later = APIRouter(), APIRouter()

    async def echo(request: Request) -> dict[str, str]:
        return {"body": (await request.body()).decode()}

    async def echo_parsed(prompt: Body, request: Request) -> dict[str, str]:
        return await echo(request)

    stock.add_api_route("/v1/completions", echo_parsed, methods=["POST"])
    stock.add_api_route("/invocations", echo, methods=["POST"], dependencies=[Depends(validate_json_request)])
    for path in (ROUTE, "/v1/files", "/ping"):
        stock.add_api_route(path, echo, methods=["POST"])
    stock.add_api_route("/health", echo, methods=["GET"])
    later.add_api_route("/of/another/plugin", echo, methods=["POST"])
    app.include_router(stock)
    app.add_middleware(MisplacedPolicyMiddleware, routes=json_routes(app) - {ROUTE})
    app.include_router(later)
    return TestClient(app)


def test_what_is_refused_and_what_passes(client: TestClient) -> None:
    asked: Body = {"pruning": "fast", "prompt": "x" * 100_000}
    for path in ("/v1/completions", "/invocations"):
        refused = client.post(path, json=asked)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "pruning"
    for path in (ROUTE, "/of/another/plugin", "/ping"):
        assert json.loads(client.post(path, json=asked).json()["body"]) == asked
    plain = {**asked, "pruning": None}
    assert json.loads(client.post("/v1/completions", json=plain).json()["body"]) == plain, "the body is there for it"
    files = client.post("/v1/files", files={"file": ("a", b'"pruning"')})
    assert '"pruning"' in files.json()["body"]
    assert client.get("/health").status_code == 200


def test_a_body_in_parts_is_read_to_its_end(client: TestClient) -> None:
    text = json.dumps({"prompt": "x" * 1000, "pruning": "fast"}).encode()
    parts = [text[at : at + 100] for at in range(0, len(text), 100)]
    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=iter(parts), headers=headers).status_code == 400
    plain = [part.replace(b"x", b"y") for part in parts[:-1]] + [b'"}']
    answer = client.post("/v1/completions", content=iter(plain), headers=headers)
    assert answer.json()["body"].encode() == b"".join(plain)


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_every_route_that_does_not_prune_says_so(server: Server) -> None:
    """Every one that the server lists as one that takes a body, and SageMaker's, which reads its body itself."""
    paths = server.get("/openapi.json").json()["paths"]
    routes = (
        {path for path, methods in paths.items() if "requestBody" in methods.get("post", ())}
        - PRUNING
        - {"/v1/pruning/plan"}
    )
    routes |= {"/invocations"}
    assert {"/v1/completions", "/tokenize"} < routes
    messages = [user("Where is the zebra?", fresh_url())]
    for path in routes:
        for name, field in (
            ("pruning", {"pruning": "fast"}),
            ("mm_processor_kwargs.pruning", {"mm_processor_kwargs": {"pruning": {"method": "none"}}}),
        ):
            answer = server.post({"messages": messages, **field}, path)
            assert answer.status_code == 400, f"{path}: {answer.status_code} {answer.text[:300]}"
            assert answer.json().keys() == {"error"}
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("BadRequestError", 400)
            assert error["message"] == f"{name}: {path} does not prune; expected a request to {ROUTE}, or no policy."
            assert f"Request without an id to {path} refused: 400 BadRequestError, {name}" in server.log.read_text()
    assert server.post({"pruning": "fast"}, "/ping").status_code == 200

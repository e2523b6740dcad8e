"""What an operator's `--api-key` guards."""

from argparse import Namespace
from http import HTTPStatus

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_vtprune_server.plugin import ServerPlugin
from vllm_vtprune_server.route import ErrorShapeMiddleware
from vllm_vtprune_server.routes import messages_router, router

ROUTES = [
    (method, route.path)
    for route in (*router.routes, *messages_router.routes)
    if isinstance(route, APIRoute)
    for method in route.methods
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_of_ours_wants_the_key(method: str, path: str) -> None:
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    ServerPlugin().attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    app.add_middleware(ErrorShapeMiddleware)
    client = TestClient(app, raise_server_exceptions=False)
    for key in (None, "another"):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        refused = client.request(method, path, headers=headers)
        assert refused.status_code == HTTPStatus.UNAUTHORIZED
        error = refused.json()["error"]
        is_anthropic = path.startswith("/v1/messages")
        assert error["type"] == ("authentication_error" if is_anthropic else "AuthenticationError")
        assert "expected the header `Authorization: Bearer KEY`" in error["message"]
    reached = client.request(method, path, headers={"authorization": "Bearer secret"}, content=b"{")
    assert reached.status_code != HTTPStatus.UNAUTHORIZED


def test_they_are_all_looked_at() -> None:
    assert {("POST", "/v1/chat/completions"), ("POST", "/v1/pruning/plan"), ("GET", "/v1/pruning")} <= {*ROUTES}

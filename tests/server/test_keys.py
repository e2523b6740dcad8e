"""What an operator's `--api-key` guards."""

from argparse import Namespace
from http import HTTPStatus

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_vtprune_server.plugin import ServerPlugin, router

ROUTES = [(method, route.path) for route in router.routes if isinstance(route, APIRoute) for method in route.methods]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_of_ours_wants_the_key(method: str, path: str) -> None:
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    ServerPlugin().attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    client = TestClient(app, raise_server_exceptions=False)
    for key in (None, "another"):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        assert client.request(method, path, headers=headers).status_code == HTTPStatus.UNAUTHORIZED
    reached = client.request(method, path, headers={"authorization": "Bearer secret"}, content=b"{")
    assert reached.status_code != HTTPStatus.UNAUTHORIZED


def test_they_are_all_looked_at() -> None:
    assert {("POST", "/v1/chat/completions"), ("POST", "/v1/pruning/plan"), ("GET", "/v1/pruning")} <= {*ROUTES}

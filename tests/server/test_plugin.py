"""A server under plain `vllm serve` with our plugin named: it starts pruning, or it does not start."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.datastructures import State
from starlette.middleware.gzip import GZipMiddleware
from starlette.testclient import TestClient

from vllm_vtprune.plugin.families.llava import PrunedLlavaProcessor
from vllm_vtprune_server.plugin import ServerPlugin, watch_outcomes

PRUNED = object.__new__(PrunedLlavaProcessor)  # without the vision encoder that the test would have to load


@pytest.mark.parametrize(
    ("processor", "encodes_only", "why"),
    [
        (None, False, "NoneType"),
        (object(), False, "object"),
        (PRUNED, True, r"this instance encodes only \(mm_encoder"),
    ],
)
def test_a_model_that_is_not_pruned_stops_the_start_if_it_is_to_be_pruned(
    processor: object, encodes_only: bool, why: str
) -> None:
    """vLLM answers /health only after this has returned."""
    config = SimpleNamespace(is_mm_encoder_only=encodes_only, kv_transfer_config=None, ec_transfer_config=None)
    client = SimpleNamespace(renderer=SimpleNamespace(mm_processor=processor), vllm_config=config)
    state = State()
    args = Namespace(model="some-model", pruning_default="balanced")
    with pytest.raises(RuntimeError, match=f"some-model cannot be pruned, .*: {why}"):
        asyncio.run(ServerPlugin().init_state(client, state, args))  # type: ignore[arg-type]
    assert len(state) == 0, "nothing was taken over"


def test_a_stack_that_others_build_anew_is_watched_too() -> None:
    app = FastAPI()
    watch_outcomes(app, "model")
    app.middleware_stack = None  # as Ray Serve does, to add its own middleware to an app that vLLM has built
    app.add_middleware(GZipMiddleware)
    answer = TestClient(app).get("/no/such/route")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404), "a bare status in the API's shape"

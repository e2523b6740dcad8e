"""A server under plain `vllm serve` with our plugin named: it starts pruning, or it does not start."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import pytest
from starlette.datastructures import State

from vllm_vtprune_server.plugin import ServerPlugin


@pytest.mark.parametrize("processor", [None, object()])
def test_a_model_without_our_processor_stops_the_start_if_it_is_to_be_pruned(processor: object) -> None:
    """vLLM answers /health only after this has returned."""
    client = SimpleNamespace(renderer=SimpleNamespace(mm_processor=processor))
    state = State()
    args = Namespace(model="some-model", pruning_default="balanced")
    with pytest.raises(RuntimeError, match=f"some-model cannot be pruned, .*: {type(processor).__name__}"):
        asyncio.run(ServerPlugin().init_state(client, state, args))  # type: ignore[arg-type]
    assert len(state) == 0, "nothing was taken over"

"""A server under plain `vllm serve` with our plugin named: it starts pruning, or it does not start."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import pytest
from starlette.datastructures import State

from vllm_vtprune.plugin.families.llava import PrunedLlavaProcessor
from vllm_vtprune_server.plugin import ServerPlugin

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

"""The schema of a request explains every part of the `pruning` field, and shows it where it may stand."""

import pytest
from pydantic import BaseModel

from vllm_vtprune.policy import EnergyBudget, MethodBudget, PruningPolicy, RatioBudget, TextOptions, TokensBudget
from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.schema import MEANINGS

MODELS = [PruningPolicy, EnergyBudget, RatioBudget, TokensBudget, MethodBudget, TextOptions]


@pytest.mark.parametrize("model", MODELS)
def test_every_field_has_a_meaning_and_shows_what_it_accepts(model: type[BaseModel]) -> None:
    assert list(MEANINGS[model.__name__]) == list(model.model_fields)
    shown = PruningChatCompletionRequest.model_json_schema()["$defs"][model.__name__]["properties"]
    for name, field in model.model_fields.items():
        description = shown[name]["description"]
        assert description.startswith(MEANINGS[model.__name__][name])
        assert description.count(MEANINGS[model.__name__][name]) == 1
        assert field.description is None or description.endswith(f"{field.description}.")


def test_asking_for_the_schema_changes_no_model() -> None:
    once = PruningChatCompletionRequest.model_json_schema()
    assert PruningChatCompletionRequest.model_json_schema() == once
    assert PruningPolicy.model_fields["alpha"].description == "null or a number from 0 to 16"


def test_the_field_stands_beside_images_and_nothing_else() -> None:
    schema = PruningChatCompletionRequest.model_json_schema()
    having = {name for name, model in schema["$defs"].items() if "pruning" in model.get("properties", {})}
    assert having == {
        "ChatCompletionContentPartImageParam",
        "ChatCompletionContentPartImageEmbedsParam",
        "CustomChatCompletionContentSimpleImageParam",
    }

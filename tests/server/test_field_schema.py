"""The schema of a request explains every part of the `pruning` field, and shows it where it may stand."""

import json

from jsonschema import Draft202012Validator

from tests.core.test_policy_corpus import CORPUS
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors import METHODS
from vllm_vtprune_server.protocol import PruningChatCompletionRequest

TOKENS = {"type": "tokens", "keep": 9}
SCHEMA = PruningChatCompletionRequest.model_json_schema()
POLICY = Draft202012Validator({"$ref": "#/$defs/PruningPolicy", "$defs": SCHEMA["$defs"]})


def test_every_field_of_every_method_is_explained() -> None:
    names = [part["$ref"].split("/")[-1] for part in SCHEMA["$defs"]["PruningPolicy"]["oneOf"]]
    assert len(names) == len(METHODS) + 1
    for name in [*names, "EnergyBudget", "RatioBudget", "TokensBudget", "MethodBudget", "TextOptions"]:
        model = SCHEMA["$defs"][name]
        assert model["description"]
        assert all(
            field.get("description") for key, field in model["properties"].items() if key not in ("method", "type")
        )


def test_what_a_method_uses_is_in_its_part_of_the_schema_and_in_no_other() -> None:
    """The dump of a policy holds the fields that its method uses; others are accepted at their defaults alone."""
    dumps = [line["dump"] for line in map(json.loads, CORPUS.read_text().splitlines()) if "dump" in line]
    for dump in [*dumps, *(PruningPolicy.parse({"method": name, "budget": TOKENS}).dump() for name in METHODS)]:
        assert POLICY.is_valid(dump), dump
    for body in ({}, {"alpha": 0.5}, {"budget": {"min_tokens": 1}}, {"method": "none"}):
        assert POLICY.is_valid(body), body
    for body in ({"method": "last", "alpha": None}, {"sigma_d": 1.5}, {"alpha": 17}, {"method": "bogus"}, {"foo": 1}):
        assert not POLICY.is_valid(body), body


def test_asking_for_the_schema_changes_no_model() -> None:
    assert PruningChatCompletionRequest.model_json_schema() == SCHEMA


def test_the_field_stands_beside_images_and_nothing_else() -> None:
    having = {name for name, model in SCHEMA["$defs"].items() if "pruning" in model.get("properties", {})}
    assert having == {
        "ChatCompletionContentPartImageParam",
        "ChatCompletionContentPartImageEmbedsParam",
        "CustomChatCompletionContentSimpleImageParam",
    }

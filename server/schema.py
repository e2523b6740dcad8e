"""Complete the schema of the ``pruning`` field in ``/openapi.json``: its positions and its required tags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

if TYPE_CHECKING:
    from vllm_vtprune_server.protocol import PruningRequest

BESIDE_IMAGE = "Policy of this image; replaces the policy of the request. Refused by routes that do not prune."
KEPT = {
    "type": "boolean",
    "default": False,
    "description": "Report which tokens were kept; they are then selected in the API process.",
}
PRESET = {
    "type": "object",
    "title": "Preset",
    "properties": {
        "preset": {"type": "string", "description": "Name of a preset, in place of a policy."},
        "return_kept": KEPT,
    },
    "required": ["preset"],
    "additionalProperties": False,
}


def describe(
    schema: dict[str, Any],
    definitions: Mapping[str, Any],
    *,
    field: str,
    is_image: Callable[[Mapping[str, Any]], bool],
) -> None:
    """Complete the schema of a request with ``pruning``, in place.

    Args:
        schema: pydantic's schema.
        definitions: those to which it refers, by name.
        field: the field that holds content parts.
        is_image: whether a schema is that of a content part with an image.
    """
    fields = schema["properties"]
    for part in _parts(fields["pruning"], definitions):
        tag = part.get("discriminator", {}).get("propertyName")
        for other in part["oneOf"][1:] if tag else []:  # a missing tag means the first model
            model = definitions[_name(other)]
            model["required"] = sorted({tag, *model.get("required", [])})
        for method in part["oneOf"] if tag else []:
            definitions[_name(method)]["properties"]["return_kept"] = KEPT
    fields["pruning"]["anyOf"].insert(1, PRESET)
    beside = {**fields["pruning"], "description": BESIDE_IMAGE}
    for part in _parts(fields[field], definitions):
        if is_image(part):
            part["properties"]["pruning"] = beside


def describe_document(app: FastAPI, models: Iterable[type[PruningRequest]]) -> None:
    """Complete the schemas of requests in an app's OpenAPI document, when it is first asked for."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = stock()["components"]["schemas"]
            for model in models:
                describe(schemas[model.__name__], schemas, field=model.parts_field, is_image=model.is_image)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _name(schema: Mapping[str, Any]) -> str:
    reference: str = schema["$ref"]
    return reference.rpartition("/")[2]


def _parts(schema: Any, definitions: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every schema inside ``schema`` and its references, once."""
    seen = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            if isinstance(part.get("$ref"), str) and _name(part) not in seen:
                seen.add(_name(part))
                waiting.append(definitions[_name(part)])
            yield part
            waiting += list(part.values())

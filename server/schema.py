"""Complete the schema of the ``pruning`` field in ``/openapi.json``: its positions and its required tags."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import GetJsonSchemaHandler

BESIDE_IMAGE = "Policy of this image; replaces the policy of the request. Read by /v1/chat/completions only."
KEPT = {
    "type": "boolean",
    "default": False,
    "description": "Report which tokens were kept; they are then selected in the API process. Beside nothing else, it "
    "leaves the policy to the request or the server.",
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


def describe(schema: Any, handler: GetJsonSchemaHandler, *, image_keys: Collection[str]) -> None:
    """Complete the schema of a request with ``pruning`` and ``messages``, in place.

    Args:
        schema: pydantic's schema.
        handler: resolves its references.
        image_keys: keys of images in content parts.
    """
    fields = handler.resolve_ref_schema(schema)["properties"]
    for part in _parts(fields["pruning"], handler):
        tag = part.get("discriminator", {}).get("propertyName")
        for other in part["oneOf"][1:] if tag else []:  # a missing tag means the first model
            model = handler.resolve_ref_schema(other)
            model["required"] = sorted({tag, *model.get("required", [])})
        for method in part["oneOf"] if tag else []:
            handler.resolve_ref_schema(method)["properties"]["return_kept"] = KEPT
    fields["pruning"]["anyOf"].insert(1, PRESET)
    beside = {**fields["pruning"], "description": BESIDE_IMAGE}
    for part in _parts(fields["messages"], handler):
        if not set(image_keys).isdisjoint(part.get("properties", {})):
            part["properties"]["pruning"] = beside


def _parts(schema: Any, handler: GetJsonSchemaHandler) -> Iterator[dict[str, Any]]:
    """Every schema inside ``schema`` and its references, once."""
    seen = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            reference = part.get("$ref")
            if isinstance(reference, str) and reference not in seen:
                seen.add(reference)
                waiting.append(handler.resolve_ref_schema(part))
            yield part
            waiting += list(part.values())

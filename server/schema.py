"""What ``/openapi.json`` says of the ``pruning`` field beyond its type: where it may stand, and what needs a name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import GetJsonSchemaHandler

BESIDE_IMAGE = "Policy of this image; replaces the policy of the request. Read by /v1/chat/completions only."


def describe(schema: Any, handler: GetJsonSchemaHandler, *, image_keys: Collection[str]) -> None:
    """Complete the schema of a request that has ``pruning`` and ``messages``, in place.

    Args:
        schema: as pydantic made it.
        handler: resolves references in it.
        image_keys: the keys under which a content part may hold an image.
    """
    fields = handler.resolve_ref_schema(schema)["properties"]
    for part in _parts(fields["pruning"], handler):
        tag = part.get("discriminator", {}).get("propertyName")
        for other in part["oneOf"][1:] if tag else []:  # without a tag, the first is meant
            model = handler.resolve_ref_schema(other)
            model["required"] = sorted({tag, *model.get("required", [])})
    beside = {**fields["pruning"], "description": BESIDE_IMAGE}
    for part in _parts(fields["messages"], handler):
        if not set(image_keys).isdisjoint(part.get("properties", {})):
            part["properties"]["pruning"] = beside


def _parts(schema: Any, handler: GetJsonSchemaHandler) -> Iterator[dict[str, Any]]:
    """Every schema in ``schema`` and in what it refers to, once."""
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

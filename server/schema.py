"""Complete the schema of the ``pruning`` field in ``/openapi.json``: its positions and its required tags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import GetJsonSchemaHandler

BESIDE_IMAGE = "Policy of this image; replaces the policy of the request. Refused by routes that do not prune."


def describe(
    schema: Any, handler: GetJsonSchemaHandler, *, field: str, is_image: Callable[[Mapping[str, Any]], bool]
) -> None:
    """Complete the schema of a request with ``pruning``, in place.

    Args:
        schema: pydantic's schema.
        handler: resolves its references.
        field: the field that holds content parts.
        is_image: whether a schema is that of a content part with an image.
    """
    fields = handler.resolve_ref_schema(schema)["properties"]
    for part in _parts(fields["pruning"], handler):
        tag = part.get("discriminator", {}).get("propertyName")
        for other in part["oneOf"][1:] if tag else []:  # a missing tag means the first model
            model = handler.resolve_ref_schema(other)
            model["required"] = sorted({tag, *model.get("required", [])})
    beside = {**fields["pruning"], "description": BESIDE_IMAGE}
    for part in _parts(fields[field], handler):
        if is_image(part):
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
                with suppress(LookupError):  # not made yet: part of a recursive model
                    waiting.append(handler.resolve_ref_schema(part))
            yield part
            waiting += list(part.values())

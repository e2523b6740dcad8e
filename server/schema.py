"""What ``/openapi.json`` says of the ``pruning`` field beyond its types: where it may stand, what each part means."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import GetJsonSchemaHandler

BESIDE_IMAGE = "How to prune this image, instead of as the request says. In /v1/chat/completions alone."

MEANINGS: dict[str, dict[str, str]] = {
    "PruningPolicy": {
        "method": "How tokens are chosen; GET /v1/pruning describes the methods",
        "budget": "How many tokens stay",
        "text": "The text that an image is conditioned on",
        "gate": "How likeness to the text becomes a weight; auto: minmax; clip all but drops what is unlike the text",
        "alpha": "Strength of the text's influence, 0 for none; null: the gate's own",
        "relevance": "How a token's likeness to several nouns becomes one number",
        "seed_token": "The token that resprune begins with",
        "rank_by": "What resprune ranks by: energy not yet explained, or likeness to the text alone",
        "features": "What resprune and divprune compare tokens by: embeds, what feeds the connector, or both",
        "importance": "What adaptprune, its baselines and cover take for importance; auto: cls where there is one",
        "sigma_d": "Reach of adaptprune's suppression by distance, in tokens; null: the published code's",
        "sigma_s": "Reach of adaptprune's suppression by likeness; null: the published code's",
        "radius": "Distance up to which adaptprune suppresses, in tokens; null: the published code's",
        "correction": "Whether adaptprune prefers the centre of an image",
        "distance": "Whether adaptprune suppresses tokens near those chosen",
        "similarity": "Whether adaptprune suppresses tokens like those chosen",
        "seed": "Of random methods and of randomised solvers",
    },
    "EnergyBudget": {
        "type": "As many tokens as the image's spectral energy asks for",
        "threshold": "Share of the spectral energy to keep",
        "min_tokens": "Never fewer than this",
        "max_tokens": "Never more than this; null: no limit",
        "solver": "How the spectrum is computed; auto: exact where that is quick",
        "rank": "Singular values that the solver rsvd looks at first",
        "power_iterations": "Of the solver rsvd: more are slower and more accurate",
    },
    "RatioBudget": {"type": "A share of the image's tokens", "keep": "The share"},
    "TokensBudget": {"type": "A number of tokens", "keep": "The number"},
    "MethodBudget": {"type": "The count that the method finds by itself (prumerge, trim)"},
    "TextOptions": {
        "scope": "Whose text counts: of the message that carries the image, or of the last user message",
        "query": "A text that counts instead",
        "clean": "Whether the nouns of a question count, rather than every word",
        "modifiers": "Whether adjectives and numbers count beside the nouns; of no effect where every word counts",
    },
}
"""By model and field; the schema adds what is accepted."""


def describe(schema: Any, handler: GetJsonSchemaHandler, *, image_keys: Collection[str]) -> None:
    """Complete the schema of a request that has ``pruning`` and ``messages``, in place.

    Args:
        schema: as pydantic made it.
        handler: resolves references in it.
        image_keys: the keys under which a content part may hold an image.
    """
    fields = handler.resolve_ref_schema(schema)["properties"]
    for model in _objects_below(fields["pruning"], handler):
        for name, meaning in MEANINGS.get(model.get("title", ""), {}).items():
            field = model["properties"][name]
            accepted = field.get("description")
            field["description"] = f"{meaning}: {accepted}." if accepted else f"{meaning}."
    beside = {**fields["pruning"], "description": BESIDE_IMAGE}
    for model in _objects_below(fields["messages"], handler):
        if not set(image_keys).isdisjoint(model["properties"]):
            model["properties"]["pruning"] = beside


def _objects_below(schema: Any, handler: GetJsonSchemaHandler) -> Iterator[dict[str, Any]]:
    """Every schema of an object that ``schema`` refers to, once."""
    seen = set()
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            reference = one.get("$ref")
            if isinstance(reference, str) and reference not in seen:
                seen.add(reference)
                one = handler.resolve_ref_schema(one)
                if "properties" in one:
                    yield one
            waiting += one.values()

"""What travels with an image's pixels to the engine, so that it selects the image's tokens in its encoder step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalSharedField,
)

from vllm_vtprune.features import Layout
from vllm_vtprune.policy import PruningPolicy

SELECTION = "selection"
"""Field: (B,) uint8, a `Selection` as JSON. It stays on the CPU."""


@dataclass(frozen=True)
class Selection:
    """How to prune one image.

    Attributes:
        key: the item's hash: equal for equal images, policies and nouns.
        policy: with the family's defaults filled in.
        keep: k, tokens to keep.
        noun_ids: token ids of the nouns to condition on.
        layout: of the image's tokens.
        rows: of the item's fields that a batch joins row by row, how many rows are this image's; `attach` notes it.
        shared: fields that a batch has once; the same.
    """

    key: str
    policy: PruningPolicy
    keep: int
    noun_ids: tuple[int, ...]
    layout: Layout
    rows: Mapping[str, int] = field(default_factory=dict)
    shared: Sequence[str] = ()

    @property
    def length(self) -> int:
        """Embeddings that the engine keeps of the image: its kept tokens and its newlines."""
        return self.keep + self.layout.newlines

    def attach(self, item: MultiModalKwargsItem) -> MultiModalKwargsItem:
        """vLLM's item of the image with this selection, and with how a batch joins its fields, as one more field."""
        rows = {name: len(elem.data) for name, elem in item.items() if isinstance(elem.field, MultiModalFlatField)}
        shared = [name for name, elem in item.items() if isinstance(elem.field, MultiModalSharedField)]
        body = json.dumps(
            {
                "key": self.key,
                "policy": self.policy.dump(),
                "keep": self.keep,
                "noun_ids": self.noun_ids,
                "layout": self.layout.dump(),
                "rows": rows,
                "shared": shared,
            }
        )
        data = torch.frombuffer(bytearray(body.encode()), dtype=torch.uint8)
        elem = MultiModalFieldElem(data, MultiModalBatchedField(keep_on_cpu=True))
        return MultiModalKwargsItem({**item, SELECTION: elem})

    @classmethod
    def read(cls, data: Tensor) -> Selection:
        """Of the field of an item."""
        body = json.loads(data.numpy().tobytes())
        policy, layout = PruningPolicy.parse(body.pop("policy")), Layout.load(body.pop("layout"))
        return cls(policy=policy, layout=layout, **body)


def split(
    fields: Mapping[str, Any], selections: Sequence[Selection], parts: Sequence[range]
) -> Iterator[dict[str, Any]]:
    """The stock model's fields of a batch, in parts of consecutive images.

    Args:
        fields: of the batch, as vLLM joins those of its items.
        selections: of its images.
        parts: the indices of the images of each part.
    """
    for part in parts:
        taken = {}
        for name, value in fields.items():
            sizes = [each.rows.get(name, 1) for each in selections]
            begin = sum(sizes[: part.start])
            taken[name] = (
                value if name in selections[0].shared else value[begin : begin + sum(sizes[part.start : part.stop])]
            )
        yield taken

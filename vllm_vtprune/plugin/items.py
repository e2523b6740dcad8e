"""vLLM's item for a pruned image: its own fields, the same for every model family.

vLLM batches items with equal fields, so a batch holds either pruned images or pixels, never both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

KEPT_EMBEDS = "kept_embeds"
"""Field: (T, d) embeddings to prefill for the image."""
KEPT_POSITIONS = "kept_positions"
"""Field, with M-RoPE and where a producer selected: (k,) int64, ascending indices of the kept visual tokens."""
KEPT_PROMPT = "kept_prompt"
"""Field, with text between visual tokens: (L,) int64 ids of the placeholder, `EMBED` for visual tokens."""


def pruned_item(embeds: Tensor, on_cpu: Mapping[str, Tensor]) -> MultiModalKwargsItem:
    """The item of a pruned image.

    Args:
        embeds: (T, d) embeddings to prefill, on the CPU.
        on_cpu: fields from which positions are computed; the engine keeps them even when it needs no embeddings.
    """
    embeds_field = MultiModalFieldElem(embeds, MultiModalBatchedField())
    return with_positions(MultiModalKwargsItem({KEPT_EMBEDS: embeds_field}), on_cpu)


def with_positions(item: MultiModalKwargsItem, on_cpu: Mapping[str, Tensor]) -> MultiModalKwargsItem:
    """An item with fields from which positions are computed; see `pruned_item`."""
    fields = dict(item)
    for name, data in on_cpu.items():
        fields[name] = MultiModalFieldElem(data, MultiModalBatchedField(keep_on_cpu=True))
    return MultiModalKwargsItem(fields)


class TakesKeptEmbeddings:
    """Mixin before a stock model: returns the embeddings of pruned images; the stock code encodes all others."""

    _takes_embeds = True
    """Whether clients may send image embeddings of any length."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Embeddings of a batch of images or videos, in order.

        Args:
            kwargs: `KEPT_EMBEDS` (B, T, d), or a list of B tensors (T, d), for pruned images; else those of the stock
                model.

        Returns:
            One (T, d) tensor for each pruned image; else as the stock model.
        """
        kept = kwargs.get(KEPT_EMBEDS)
        if kept is None and self._takes_embeds and "image_grid_thw" not in kwargs:
            kept = kwargs.get("image_embeds")
        return super().embed_multimodal(**kwargs) if kept is None else list(kept)  # type: ignore[misc]

"""What a pruned image is to vLLM: an item with fields of its own, the same for every model family.

vLLM joins items with the same fields into one batch, so a batch holds either pruned images or images in pixels, and
whatever reads pixels never meets a pruned one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem

KEPT_EMBEDS = "kept_embeds"
"""Field: (T, d) what is prefilled for the image."""
KEPT_POSITIONS = "kept_positions"
"""Field, of families whose positions follow the grid: (k,) int64, ascending, which of the image's tokens are kept."""
KEPT_PROMPT = "kept_prompt"
"""Field, of families that have text between an image's tokens: (L,) int64 what stands in the prompt, as of `EMBED`."""


def pruned_item(embeds: Tensor, on_cpu: Mapping[str, Tensor]) -> MultiModalKwargsItem:
    """The item of a pruned image.

    Args:
        embeds: (T, d) to be prefilled, on the CPU.
        on_cpu: fields that positions are computed from; the engine keeps them where it has no need of the embeddings.
    """
    fields = {KEPT_EMBEDS: MultiModalFieldElem(embeds, MultiModalBatchedField())}
    for name, data in on_cpu.items():
        fields[name] = MultiModalFieldElem(data, MultiModalBatchedField(keep_on_cpu=True))
    return MultiModalKwargsItem(fields)


class TakesKeptEmbeddings:
    """Mixin before a stock model: pruned images pass as they come, all others go to the stock code."""

    _takes_embeds = True
    """Whether embeddings by clients pass too, as they stand: of as many rows each as they like."""

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

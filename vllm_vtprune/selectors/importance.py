"""One number for each token, for the methods that start from a map of importance.

AdaptPrune and FastV read it from the attention of the language model, which is not there before prefill. The parameter
``importance`` says what stands in for it.
"""

from typing import Annotated, Literal

from pydantic import Field

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.gate import minmax
from vllm_vtprune.selectors.method import FamilyDefaults, Needs
from vllm_vtprune.selectors.similarity import CHUNK, TINY, ReadsRelevance, squared_lengths, text_relevance, unit_rows


class ReadsImportance(ReadsRelevance):
    uses = frozenset({"text", "cls_attention"})

    importance: Annotated[Literal["auto", "cls", "relevance", "norm", "residual"], Needs(cls="cls_attention")] = Field(
        default="auto",
        description="What makes a token important: CLS attention, similarity to the text, its length, or its energy "
        "outside the direction of the mean token; auto: cls where the encoder has a CLS token, else norm.",
    )

    def defaults(self, family: FamilyDefaults) -> dict[str, object]:
        return super().defaults(family) | {"importance": family.attention_or_norm}

    def idle(self) -> frozenset[str]:
        unread = set() if self.importance in ("auto", "cls") else {"cls_attention"}
        return super().idle() | unread | (set() if self.importance == "relevance" else {"text", "relevance"})

    def importance_map(self, features: VisualFeatures, text_embeds: Tensor | None) -> Tensor:
        """``(N,)`` in float64, never negative, the caller's to change.

        Similarity to the text is scaled as by ResPrune's gate ``minmax``; without a text, CLS attention or else the
        length stands in for it.
        """
        kind = self.importance
        if kind == "relevance" and text_embeds is not None:
            unit = unit_rows(features.embeds)
            relevance = text_relevance(unit, text_embeds.to(unit.dtype), self.relevance)
            return minmax(relevance.double()).float().double()  # of few digits: sums of them are exact
        if kind in ("cls", "relevance") and features.cls_attention is not None:
            return features.cls_attention.to(torch.float64, copy=True)
        if kind == "residual":
            return unlike_the_mean(features.embeds)
        return squared_lengths(features.embeds).sqrt()


def unlike_the_mean(rows: Tensor) -> Tensor:
    """``(N,)`` energy, in float64, of each of the ``rows (N, d)`` outside the direction of their mean.

    Computed from their differences from the mean: where rows are alike, their own lengths would cancel.
    """
    mean = rows.sum(dim=0, dtype=torch.float64) / len(rows)
    direction = mean / torch.linalg.vector_norm(mean).clamp(min=TINY)
    energies = []
    for chunk in torch.split(rows, CHUNK):
        apart = chunk.double() - mean
        energies.append(apart.square().sum(dim=1) - (apart * direction).sum(dim=1).square())
    return torch.cat(energies).clamp(min=0)

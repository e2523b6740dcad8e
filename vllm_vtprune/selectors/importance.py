"""A token's importance, for methods that start from an importance map.

AdaptPrune and FastV use the language model's attention, which does not exist before prefill. The parameter
``importance`` selects a substitute.
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
        unread = set() if self.importance in ("auto", "cls", "relevance") else {"cls_attention"}
        return super().idle() | unread | (set() if self.importance == "relevance" else {"text", "relevance"})

    def importance_map(self, features: VisualFeatures, text_embeds: Tensor | None) -> Tensor:
        """``(N,)`` float64, at least 0; a fresh tensor.

        ``relevance`` is scaled by ResPrune's gate ``minmax``; without a text it falls back to CLS attention, or else to
        the norm.
        """
        kind = self.importance
        if kind == "relevance" and text_embeds is not None:
            unit = unit_rows(features.embeds)
            relevance = text_relevance(unit, text_embeds.to(unit.dtype), self.relevance)
            return minmax(relevance.double()).float().double()  # float32 values, so float64 sums are exact
        if kind in ("cls", "relevance") and features.cls_attention is not None:
            return features.cls_attention.to(torch.float64, copy=True)
        if kind == "residual":
            return unlike_the_mean(features.embeds)
        return squared_lengths(features.embeds).sqrt()


def unlike_the_mean(rows: Tensor) -> Tensor:
    """``(N,)`` energy of each of ``rows (N, d)`` orthogonal to their mean, in float64.

    Computed from the differences to the mean, which avoids cancellation if rows are similar.
    """
    mean = rows.sum(dim=0, dtype=torch.float64) / len(rows)
    direction = mean / torch.linalg.vector_norm(mean).clamp(min=TINY)
    energies = []
    for chunk in torch.split(rows, CHUNK):
        centred = chunk.double() - mean
        energies.append(centred.square().sum(dim=1) - (centred * direction).sum(dim=1).square())
    return torch.cat(energies).clamp(min=0)

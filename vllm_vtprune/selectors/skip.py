"""Skip: every other token by importance. A baseline of AdaptPrune's paper (Table 5 b)."""

from typing import Literal

from vllm_vtprune.features import Counted, VisualFeatures
from vllm_vtprune.lazy import Tensor
from vllm_vtprune.selectors.importance import ReadsImportance


class Skip(ReadsImportance):
    method: Literal["skip"] = "skip"
    idea = "every other token in order of importance"
    paper = "baseline (AdaptPrune, Table 5 b)"
    arxiv = "2503.08019"
    cost = "ranking"
    capped = True
    equivariant = True

    @classmethod
    def max_keep(cls, features: Counted) -> int:
        return (features.num_tokens + 1) // 2

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``: first, third, fifth, ... by importance; ``k`` is at most half of ``N``, rounded up."""
        ranking = self.importance_map(features, text_embeds).sort(descending=True, stable=True).indices
        return ranking[::2][:k]

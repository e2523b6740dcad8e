"""Last: a baseline of AdaptPrune's paper (Table 5 g)."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method


class Last(Method):
    method: Literal["last"] = "last"
    idea = "the last tokens"
    paper = "baseline (AdaptPrune, Table 5 g)"
    arxiv = "2503.08019"
    cost = "ranking"

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``, last first."""
        n = features.num_tokens
        return torch.arange(n - 1, n - 1 - k, -1, device=features.embeds.device)

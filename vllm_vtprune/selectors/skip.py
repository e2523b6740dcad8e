"""Skip: every other of the most important tokens. A baseline of AdaptPrune's paper (Table 5 b)."""

from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.importance import importance_map


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)``: the first, third, fifth and so on by importance; ``k`` is at most half of ``N``."""
    ranking = importance_map(features, policy, text_embeds).sort(descending=True, stable=True).indices
    return ranking[::2][:k]

"""Last: the image's last tokens. A baseline of AdaptPrune's paper (Table 5 g)."""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)``, last first."""
    n = features.num_tokens
    return torch.arange(n - 1, n - 1 - k, -1, device=features.embeds.device)

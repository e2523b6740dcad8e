"""Random: tokens drawn without replacement. A method that does not beat it is not worth serving."""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in the order they were drawn; the same on every device for the same ``policy.seed``."""
    generator = torch.Generator().manual_seed(policy.seed)
    return torch.randperm(features.num_tokens, generator=generator)[:k].to(features.embeds.device)

"""Random: tokens drawn without replacement. A baseline that every method should beat."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method


class Random(Method):
    method: Literal["random"] = "random"
    idea = "random tokens"
    cost = "ranking"
    draws = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` in order of drawing; determined by ``self.seed``, independent of the device."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(features.num_tokens, generator=generator)[:k].to(features.embeds.device)

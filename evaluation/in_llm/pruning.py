"""What a method that prunes inside the language model decides, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from vllm_vtprune.budget import token_budget
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import EnergyBudget, RatioBudget, TokensBudget

Budget: TypeAlias = EnergyBudget | RatioBudget | TokensBudget


@dataclass(frozen=True, eq=False)
class Entrance:
    """The n visual tokens before a layer that drops some of them.

    Attributes:
        features: all N visual tokens of the picture, from encoder and projector.
        remaining: ``(n,)`` ascending indices of the tokens that are still present.
        attention_before: ``(n,)`` attention that the last token of the prompt paid to them in the layer before, mean
            over heads. None before the first layer.
        layer: the decoder layer.
        hidden: ``(1, T, d)`` input of the layer, including text.
        rotary: cosines and sines ``(1, T, d_head)`` of the T positions.
        mask: ``(1, 1, T, T)`` causal, to be added.
        start: index of the first visual token among the T.
    """

    features: VisualFeatures
    remaining: Tensor
    attention_before: Tensor | None
    layer: Any
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor
    start: int

    @property
    def attention_here(self) -> Tensor:
        """``(n,)`` attention that the last token of the prompt would pay to them in this layer, mean over heads."""
        normed = self.layer.input_layernorm(self.hidden)
        _, weights = self.layer.self_attn(normed, position_embeddings=self.rotary, attention_mask=self.mask)
        return last_attention(weights, self.start, len(self.remaining))

    @property
    def keys(self) -> Tensor:
        """``(n, heads * d_head)`` their keys in this layer, of all heads, before the rotation by position."""
        visual = self.hidden[0, self.start : self.start + len(self.remaining)]
        keys: Tensor = self.layer.self_attn.k_proj(self.layer.input_layernorm(visual))
        return keys


class Pruning(ABC):
    """A method with its parameters."""

    @abstractmethod
    def schedule(self, features: VisualFeatures, layers: int) -> list[int]:
        """Visual tokens that each of the ``layers`` sees: N in the first, non-increasing.

        Raises:
            ValueError: the parameters do not fit the number of layers.
        """

    @abstractmethod
    def choose(self, entrance: Entrance, count: int) -> Tensor:
        """``(count,)`` indices into ``entrance.remaining`` to keep, in any order; ``count`` is below n."""


def last_attention(weights: Tensor, start: int, count: int) -> Tensor:
    """``(count,)`` mean over heads of the last row of ``weights (1, heads, T, T)``, from column ``start`` on."""
    return weights[0, :, -1, start : start + count].mean(dim=0)


def strongest(scores: Tensor, count: int) -> Tensor:
    """``(count,)`` indices of the largest of ``scores (n,)``; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count]


@dataclass(frozen=True)
class DropOnce(Pruning):
    """A method that drops tokens once, before one layer.

    Attributes:
        budget: k, the kept tokens.
        after: layers that see all tokens, from 1 to one less than the model's; FastV's K.
    """

    budget: Budget
    after: int = 2

    def schedule(self, features: VisualFeatures, layers: int) -> list[int]:
        k, _ = token_budget(self.budget, features)
        return [features.num_tokens] * self.after + [k] * (layers - self.after)

"""The static facts about a model family: where its encoder is read, and what requests may set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PretrainedConfig

from vllm_vtprune.budget import fixed_count
from vllm_vtprune.options import Budget, RatioBudget, TokensBudget
from vllm_vtprune.policy import FamilyDefaults
from vllm_vtprune.selectors.method import Input
from vllm_vtprune.selectors.resize import largest_area


def unmerged(config: Any) -> int:
    """`Family.merge` of encoders with one token per patch."""
    return 1


def first_argument(module: nn.Module, states: Tensor, *others: Any) -> Tensor:
    """`Family.rows` of connectors that take one row per patch or token."""
    return states


def zero(config: Any) -> int:
    """0 for every config."""
    return 0


def in_language_model(name: str) -> bool:
    """Whether a parameter of a transformers model belongs to its language model."""
    return "language_model." in name or "text_model." in name or name.startswith("lm_head.")


def parameters_in_transformers(config: PretrainedConfig) -> int:
    """Parameter count of encoder and connector, from transformers' model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(weights.numel() for name, weights in model.named_parameters() if not in_language_model(name))


@dataclass(frozen=True, kw_only=True)
class Family(FamilyDefaults):
    """Models that are pruned in the same way. Callables take the model's HF config.

    Attributes:
        name: name of the family's module.
        connector: path, in vLLM's model, of the module whose input feeds the connector. Modules that vLLM could compile
            bypass hooks: name a module inside them. Empty if only the embeddings are known.
        rows: extracts the connector input from that module and its call arguments: one row per patch or token, the
            patches of a token adjacent.
        pooled: whether a row is already the mean of a token's patches.
        attention: paths of the attention in the encoder's first layer and in the layer whose output is used, for
            encoders with a CLS token. A negative index counts layers from the end.
        merge: patches per token in either direction.
        deepstack: additional planes of embeddings per token (DeepStack).
        patches: most patches of an image, if more than its tokens have; else 0.
        intermediate: feed-forward width of the encoder's layers, if not ``intermediate_size``; else 0.
        tuned: whether the defaults were calibrated on this family.
        fixed_length: whether the number of kept tokens alone determines an image's placeholder in the prompt.
        options: HF processor options that a request may set, besides `vllm_vtprune.plugin.limits.VALUE_OPTIONS`.
        parameters: parameter count of encoder and connector.
    """

    name: str
    connector: str
    attention: tuple[str, str] | None = None
    merge: Callable[[Any], int] = unmerged
    rows: Callable[..., Tensor] = first_argument
    pooled: bool = False
    deepstack: Callable[[Any], int] = zero
    patches: Callable[[Any], int] = zero
    intermediate: Callable[[Any], int] = zero
    tuned: bool = True
    fixed_length: bool = True
    options: frozenset[str] = frozenset()
    parameters: Callable[[Any], int] = parameters_in_transformers

    @property
    def inputs(self) -> frozenset[Input]:
        return super().inputs if self.connector else super().inputs - {"encoder"}


class DynamicResolution(ABC):
    """Mixin for processors whose token count follows the image's size."""

    @property
    @abstractmethod
    def token_side(self) -> int:
        """Side of a visual token, in pixels of the resized image."""

    @abstractmethod
    def distinct_tokens(self, item: Mapping[str, Any]) -> tuple[int, ...]:
        """Indices of the visual tokens whose pixels differ from those of every earlier one, ascending.

        Args:
            item: vLLM's item of the image.
        """

    @abstractmethod
    def num_tokens(self, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> int:
        """Visual tokens of an unpruned image. Non-decreasing in the area of `at_area`, and 1 for area 1.

        Args:
            size: height and width in pixels.
            hf_kwargs: options of the HF processor.
        """

    @abstractmethod
    def at_area(self, hf_kwargs: Mapping[str, object], area: int) -> Mapping[str, object]:
        """HF processor options that resize images to about ``area`` pixels, and are ``hf_kwargs`` otherwise."""

    def area_for(
        self, budget: Budget, size: tuple[int, int], hf_kwargs: Mapping[str, object]
    ) -> tuple[int, int | None]:
        """The token count of an unpruned image, and the largest area in pixels within the budget.

        Args:
            budget: a fixed budget: `tokens` or `ratio`.
            size: height and width in pixels.
            hf_kwargs: options of the HF processor.

        Returns:
            Tokens, and the area; None if the image is already within the budget.
        """
        assert isinstance(budget, RatioBudget | TokensBudget)
        tokens = self.num_tokens(size, hf_kwargs)
        k = fixed_count(budget, tokens)
        if k >= tokens:
            return tokens, None
        return tokens, largest_area(lambda area: self.num_tokens(size, self.at_area(hf_kwargs, area)), k)

"""What the plugin must know of a model family, beside what its processor says of images."""

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


def one(config: Any) -> int:
    """For encoders whose patches are tokens."""
    return 1


def first_argument(module: nn.Module, states: Tensor, *others: Any) -> Tensor:
    """For modules that are given the rows as they are."""
    return states


def none(config: Any) -> int:
    """For families that lack something."""
    return 0


def of_language_model(name: str) -> bool:
    """Whether a parameter of a model in transformers belongs to its language model."""
    return "language_model." in name or "text_model." in name or name.startswith("lm_head.")


def parameters_in_transformers(config: PretrainedConfig) -> int:
    """Parameters of the vision encoder and the connector, counted in transformers' model without allocating it."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(weights.numel() for name, weights in model.named_parameters() if not of_language_model(name))


@dataclass(frozen=True)
class Family(FamilyDefaults):
    """A family of models that prune alike.

    Attributes:
        name: in lower case, as of its module.
        connector: path, in vLLM's model, of the module whose input is what feeds the connector: a row for each token or
            for each of the patches that it merges. vLLM calls modules that it could compile past their hooks, so of
            those it is one inside. Empty, where nothing but the embeddings is known.
        rows: of that module and the arguments that it is called with, those rows, the patches of a token after each
            other.
        pooled: whether those rows are the means of the patches already.
        attention: paths of the attention of the encoder's first layer and of the one whose output is read, for encoders
            with a CLS token; a negative number in a path counts layers from the end.
        merge: of a config, patches of a token in either direction.
        deepstack: of a config, how many more planes of embeddings a token has.
        patches: of a config, the most patches of an image, where they are more than those of its tokens; else 0.
        intermediate: of a config, width of the feed-forward part of the encoder's layers, where ``intermediate_size``
            is another; else 0.
        tuned: whether the defaults were chosen for it.
        fixed_length: whether what stands in a prompt for an image follows from the number of tokens that are kept,
            whichever they are.
        options: what a request may set of the HF processor, beside the values of pixels.
        parameters: of a config, parameters of encoder and connector.
    """

    name: str
    connector: str
    attention: tuple[str, str] | None = None
    merge: Callable[[Any], int] = one
    rows: Callable[..., Tensor] = first_argument
    pooled: bool = False
    deepstack: Callable[[Any], int] = none
    patches: Callable[[Any], int] = none
    intermediate: Callable[[Any], int] = none
    tuned: bool = True
    fixed_length: bool = True
    options: frozenset[str] = frozenset()
    parameters: Callable[[Any], int] = parameters_in_transformers

    @property
    def inputs(self) -> frozenset[Input]:
        return super().inputs if self.connector else super().inputs - {"encoder"}


class DynamicResolution(ABC):
    """Mixin of processors whose images have as many tokens as their size asks for."""

    @abstractmethod
    def num_tokens(self, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> int:
        """How many tokens an image has that is not pruned; never fewer for a larger `at_area`, and 1 for area 1.

        Args:
            size: height and width of the image, in pixels.
            hf_kwargs: of the HF processor that scales it.
        """

    @abstractmethod
    def at_area(self, hf_kwargs: Mapping[str, object], area: int) -> Mapping[str, object]:
        """The same options of the HF processor, but that it scales images to about ``area`` pixels."""

    def area_for(
        self, budget: Budget, size: tuple[int, int], hf_kwargs: Mapping[str, object]
    ) -> tuple[int, int | None]:
        """The tokens of an image, and the area in pixels at which they are in the budget; None where they are now."""
        assert isinstance(budget, RatioBudget | TokensBudget)
        tokens = self.num_tokens(size, hf_kwargs)
        k = fixed_count(budget, tokens)
        if k >= tokens:
            return tokens, None
        return tokens, largest_area(lambda area: self.num_tokens(size, self.at_area(hf_kwargs, area)), k)

"""What a family says of images that have as many tokens as their size asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from vllm_vtprune.budget import fixed_count
from vllm_vtprune.policy import Budget, RatioBudget, TokensBudget
from vllm_vtprune.resize import largest_area


class DynamicResolution(ABC):
    """Mixin of processors."""

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
        """The tokens of an image, and the area in pixels at which they are in the budget; None where they are already.

        Args:
            budget: of the image, which needs no features.
            size, hf_kwargs: as for `num_tokens`.
        """
        assert isinstance(budget, RatioBudget | TokensBudget)
        tokens = self.num_tokens(size, hf_kwargs)
        k = fixed_count(budget, tokens)
        if k >= tokens:
            return tokens, None
        return tokens, largest_area(lambda area: self.num_tokens(size, self.at_area(hf_kwargs, area)), k)

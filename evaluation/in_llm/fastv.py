"""FastV: after a few layers, the tokens that the end of the prompt looks at.

"An Image is Worth 1/2 Tokens After Layer 2", in the form in which E-AdaPrune and AdaptPrune compare with it.
"""

from dataclasses import dataclass

from torch import Tensor

from evaluation.in_llm.pruning import (
    Budget,
    Entrance,
    Pruning,
    check_after,
    check_budget,
    drop_once,
    strongest,
    tokens_to_keep,
)
from vllm_vtprune.features import VisualFeatures


@dataclass(frozen=True)
class FastV(Pruning):
    """The k tokens stay to which the last token of the prompt paid most attention in the last layer that sees all.

    Attributes:
        budget: k, the tokens that stay.
        after: layers that see all tokens, 1 or more and fewer than the model has; the paper's K.
    """

    budget: Budget
    after: int = 2

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_after(self.after)

    def schedule(self, features: VisualFeatures, layers: int) -> list[int]:
        return drop_once(features.num_tokens, tokens_to_keep(self.budget, features), self.after, layers)

    def choose(self, entrance: Entrance, count: int) -> Tensor:
        assert entrance.attention_before is not None
        return strongest(entrance.attention_before, count)

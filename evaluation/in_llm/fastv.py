"""FastV: after a few layers, the tokens that the end of the prompt looks at.

"An Image is Worth 1/2 Tokens After Layer 2", in the form in which E-AdaPrune and AdaptPrune compare with it.
"""

from dataclasses import dataclass

from torch import Tensor

from vllm_vtprune_evaluation.in_llm.pruning import DropOnce, Entrance, strongest


@dataclass(frozen=True)
class FastV(DropOnce):
    """The k tokens stay to which the last token of the prompt paid most attention in the last layer that sees all.

    Attributes:
        budget: k, the tokens that stay.
        after: layers that see all tokens, 1 or more and fewer than the model has; the paper's K.
    """

    def choose(self, entrance: Entrance, count: int) -> Tensor:
        assert entrance.attention_before is not None
        return strongest(entrance.attention_before, count)

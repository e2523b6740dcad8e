"""FastV: after a few layers, keep the tokens with the highest attention from the prompt's last token.

"An Image is Worth 1/2 Tokens After Layer 2", in the form that E-AdaPrune and AdaptPrune compare with.
"""

from dataclasses import dataclass

from torch import Tensor

from vllm_vtprune_evaluation.in_llm.pruning import DropOnce, Entrance, strongest


@dataclass(frozen=True)
class FastV(DropOnce):
    """Keep the k tokens with the highest attention from the prompt's last token in the last unpruned layer."""

    def choose(self, entrance: Entrance, count: int) -> Tensor:
        assert entrance.attention_before is not None
        return strongest(entrance.attention_before, count)

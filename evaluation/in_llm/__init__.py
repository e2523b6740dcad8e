"""Methods that prune visual tokens inside the language model, in plain transformers, for accuracy comparisons.

They rank tokens by attention maps and give each layer its own KV cache length, which paged attention cannot serve. A
method is a frozen dataclass with a budget; an `EnergyBudget` makes it E-AdaPrune's "+E".

    model = InLLM(checkpoint)
    model.answer(picture, "What colour is the car?", FastV(TokensBudget(keep=64)))
    model.answer(picture, "What colour is the car?", FastV(EnergyBudget(threshold=0.99)))

Kept tokens keep their position ids, and generated tokens continue those of the unpruned prompt.

The meaning of the budget's k depends on the method:

| method | k is |
|---|---|
| `FastV`, `AdaptPrune` | the kept tokens from layer `after` on; earlier layers see all |
| `PyramidDrop`, `VTW` | the mean over the layers |

`Answer.tokens` is the mean over the layers for all of them.
"""

from vllm_vtprune_evaluation.in_llm.adaptprune import AdaptPrune
from vllm_vtprune_evaluation.in_llm.driver import Answer, InLLM
from vllm_vtprune_evaluation.in_llm.fastv import FastV
from vllm_vtprune_evaluation.in_llm.pruning import Budget, Pruning
from vllm_vtprune_evaluation.in_llm.pyramiddrop import PyramidDrop
from vllm_vtprune_evaluation.in_llm.vtw import VTW

__all__ = ["VTW", "AdaptPrune", "Answer", "Budget", "FastV", "InLLM", "Pruning", "PyramidDrop"]

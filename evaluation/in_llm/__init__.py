"""Methods that prune visual tokens inside the language model, in plain transformers: the accuracy side of comparisons.

They rank tokens by attention maps and leave each layer a KV cache of its own length, which paged attention cannot
serve. A method is a small frozen dataclass with a budget. With a fixed budget it is the static method; with an
`EnergyBudget` it is the method "+E" of E-AdaPrune, whose count follows the picture.

    model = InLLM(checkpoint)
    model.answer(picture, "What colour is the car?", FastV(TokensBudget(keep=64)))
    model.answer(picture, "What colour is the car?", FastV(EnergyBudget(threshold=0.99)))

In all of them the tokens that stay keep their position ids, and what is generated continues those of the whole prompt.

What the budget's k means differs, because the methods do:

| method | k is |
|---|---|
| `FastV`, `AdaptPrune` | the tokens that stay, from layer `after` on; the layers before see all |
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

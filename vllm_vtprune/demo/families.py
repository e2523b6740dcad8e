"""The model families of which a tiny checkpoint can be made on the spot, and what its weights are."""

from typing import Literal, TypeAlias

DEFAULT = "llava"

FAMILIES = {
    "llava": "vllm_vtprune.demo.checkpoint:write_llava_checkpoint",
    "llava_next": "vllm_vtprune.demo.llava_next:write_llava_next_checkpoint",
    "internvl": "vllm_vtprune.demo.internvl:write_internvl_checkpoint",
    "qwen2_5_vl": "vllm_vtprune.demo.qwen2_5_vl:write_qwen2_5_vl_checkpoint",
    "qwen3_vl": "vllm_vtprune.demo.qwen3_vl:write_qwen3_vl_checkpoint",
}
"""Family -> the function that writes its tiny checkpoint into a directory, as ``module:function``."""

Weights: TypeAlias = Literal["trained", "random"]

RANDOM_WEIGHTS = (
    "Random weights: answers and the choice of tokens mean nothing; speed and the number of tokens kept do."
)
"""Said above whatever a checkpoint with random weights gives."""


def weights_of(model: str | None, family: str) -> Weights | None:
    """What the weights are of the checkpoint that is taken; None for a user's, of which nothing is known.

    Args:
        model: the user's, if one is named.
        family: whose checkpoint is taken otherwise.
    """
    if model is not None:
        return None
    return "trained" if family == DEFAULT else "random"

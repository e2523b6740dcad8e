"""The model families of which a tiny checkpoint can be made on the spot, and what its weights are."""

from typing import Literal, TypeAlias

import vllm_vtprune.families

DEFAULT = "llava"

FAMILIES = {
    family: f"vllm_vtprune_checkpoints.{family}:write_{family}_checkpoint" for family in vllm_vtprune.families.FAMILIES
}
"""Family -> the function that writes its tiny checkpoint into a directory, as ``module:function``."""

WITH_CODE = frozenset({"internvl_chat"})
"""Families whose checkpoints hold code that reads their config; vLLM runs it with ``trust_remote_code`` alone."""

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

"""Where tokens are selected: in the API process before scheduling, or in the engine's encoder step.

A budget in tokens or as a ratio is a number that follows from the image's size, so nothing needs the features before
the engine encodes the image: the engine selects, and no second encoder runs. An energy budget needs the features
first, and the API process has them encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vllm.config import ModelConfig, VllmConfig

from vllm_vtprune.options import RatioBudget, TokensBudget
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import Placement
from vllm_vtprune.selectors.method import Input

Choice: TypeAlias = Literal["auto", "api", "engine"]

WATCHED: frozenset[Input] = frozenset({"encoder", "cls_attention", "overview_attention", "keys"})
"""Inputs of methods that hooks read inside the encoder; the others follow from its output and the image's size."""


def watched_inputs(policy: PruningPolicy, family: Family) -> frozenset[Input]:
    """Those of `WATCHED` that a policy that selects tokens reads of a model of this family."""
    return policy.reads & WATCHED & family.inputs


@dataclass(frozen=True)
class EnginePlacement:
    """What an engine can do in its encoder step.

    Attributes:
        choice: the operator's.
        positions: whether it can place kept tokens of M-RoPE models; None where that is not known.
        watches: why hooks inside its encoder would not see whole images; empty where they do.
    """

    choice: Choice
    positions: bool | None
    watches: str = ""

    @classmethod
    def of(cls, choice: Choice, model_config: ModelConfig, engine: VllmConfig | None) -> EnginePlacement:
        """Of an engine.

        Args:
            choice: the operator's.
            model_config: of the model.
            engine: None in a process of `vllm.LLM`, whose processors are told the model alone.
        """
        multimodal = model_config.get_multimodal_config()
        if multimodal.mm_encoder_tp_mode == "data":
            watches = "mm_encoder_tp_mode=data splits a batch of images over the ranks"
        elif engine is not None and engine.compilation_config.compile_mm_encoder:
            watches = "compile_mm_encoder compiles the encoder without hooks"
        else:
            watches = ""
        if not model_config.uses_mrope:
            positions: bool | None = True
        elif engine is None:
            positions = None
        else:
            positions = engine.use_v2_model_runner and engine.parallel_config.pipeline_parallel_size == 1
        return cls(choice, positions, watches)

    def place(self, policy: PruningPolicy, family: Family, *, param: str = "pruning") -> tuple[Placement, str | None]:
        """Where a policy selects tokens, and why not in the engine where it might be expected there.

        Args:
            policy: one that selects tokens, with the family's defaults filled in.
            family: of the model.
            param: path of the policy, for the error.

        Raises:
            PolicyError: the operator's choice is ``engine``, and the engine cannot follow the policy.
        """
        if self.choice == "api":
            return "api", None
        field, reason = self._obstacle(policy, family)
        if not reason:
            return "engine", None
        if self.choice == "auto":
            return "api", reason
        value = policy.budget.type if field == "budget.type" else policy.method
        accepted = '"tokens" or "ratio"' if field == "budget.type" else "a policy that the engine can follow"
        raise PolicyError(f"{param}.{field}", value, accepted, f"{reason}, and this server selects in its engine only")

    def _obstacle(self, policy: PruningPolicy, family: Family) -> tuple[str, str]:
        """The field to blame, and the reason; two empty strings where nothing is in the way."""
        kind = policy.budget.type
        if not isinstance(policy.budget, TokensBudget | RatioBudget):
            return "budget.type", f'budget "{kind}" needs features before scheduling'
        if not family.fixed_length:
            return "method", "the length of this model's prompt depends on which tokens are kept"
        if self.positions is False or (self.positions is None and self.choice == "auto"):
            runner = "M-RoPE needs Model Runner V2 without pipeline parallelism"
            return "method", runner if self.positions is False else f"{runner}, and the engine's is not known here"
        watched = watched_inputs(policy, family)
        if watched and self.watches:
            return "method", f"method {policy.method} reads {', '.join(sorted(watched))}, and {self.watches}"
        return "", ""

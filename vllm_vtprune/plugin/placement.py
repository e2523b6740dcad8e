"""Where tokens are selected: in the API process before scheduling, or in the engine's encoder step.

A budget in tokens or as a ratio is a number that follows from the image's size, so nothing needs the features before
the engine encodes the image: the engine selects, and no second encoder runs. An energy budget needs the features
first, and the API process has them encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vllm.config import ECTransferConfig, ModelConfig, VllmConfig

from vllm_vtprune import envs
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import Placement
from vllm_vtprune.selectors.method import Input

Choice: TypeAlias = Literal["auto", "api", "engine"]
Role: TypeAlias = Literal["producer", "consumer"]

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
        no_positions: why it cannot position kept tokens of this model; empty if it can, None if that is not known.
        no_hooks: why hooks inside its encoder would not see whole images; empty if they do.
        role: of the instance in encoder disaggregation.
    """

    choice: Choice
    no_positions: str | None = ""
    no_hooks: str = ""
    role: Role | None = None

    @classmethod
    def of(cls, choice: Choice, model_config: ModelConfig, engine: VllmConfig | None) -> EnginePlacement:
        """Of an engine.

        Args:
            choice: the operator's. A consumer with ``auto`` selects in its engine, or follows a producer's plans.
            model_config: vLLM's config of the model.
            engine: the engine's config; None in `vllm.LLM`, whose processor does not get it.
        """
        multimodal = model_config.get_multimodal_config()
        no_hooks = ""
        if multimodal.mm_encoder_tp_mode == "data":
            no_hooks = "mm_encoder_tp_mode=data splits a batch of images over the ranks"
        elif engine is not None and engine.compilation_config.compile_mm_encoder:
            no_hooks = "compile_mm_encoder compiles the encoder without hooks"
        no_positions = "" if not model_config.uses_mrope else None if engine is None else mrope_obstacle(engine)
        role = None if engine is None else role_of(engine.ec_transfer_config)
        if role == "consumer" and choice == "auto":
            choice = "engine"
        return cls(choice, no_positions, no_hooks, role)

    def place(
        self, policy: PruningPolicy, family: Family, *, return_kept: bool = False, param: str = "pruning"
    ) -> tuple[Placement, str | None]:
        """Where a policy selects tokens, and why not in the engine where it might be expected there.

        Args:
            policy: one that selects tokens, with the family's defaults filled in.
            family: of the model.
            return_kept: whether the report says which tokens were kept.
            param: path of the policy, for the error.

        Raises:
            PolicyError: the operator's choice is ``engine``, and the engine cannot follow the policy.
        """
        if self.choice == "api":
            return "api", None
        field, reason = self._obstacle(policy, family, return_kept)
        if not reason:
            return "engine", None
        if self.choice == "auto":
            return "api", reason
        value, accepted = policy.method, "a policy that the engine can follow"
        if field == "return_kept":
            value, accepted = "true", "false"
        elif field != "method":
            _, value, accepted = policy.featureless_budget()
        problem = "this server selects in its engine only"
        if self.role == "consumer":
            problem = "the request brings no plan of a producer, as the proxy would add"
        raise PolicyError(f"{param}.{field}", value, accepted, f"{reason}, and {problem}")

    def _obstacle(self, policy: PruningPolicy, family: Family, return_kept: bool) -> tuple[str, str]:
        """The field to blame, and the reason; two empty strings where nothing is in the way."""
        if policy.budget.scope == "request":
            return "budget.scope", "a budget for all images of a request needs features before scheduling"
        if policy.budget.needs_features:
            return "budget.type", f'budget "{policy.budget.type}" needs features before scheduling'
        if not family.fixed_length:
            return "method", "this model's prompt depends on which tokens are kept"
        if self.no_positions:
            return "method", self.no_positions
        if self.no_positions is None and self.choice == "auto":
            return "method", "M-RoPE needs Model Runner V2, and this process does not know the engine's"
        watched = watched_inputs(policy, family)
        if watched and self.no_hooks:
            return "method", f"method {policy.method} reads {', '.join(sorted(watched))}, and {self.no_hooks}"
        if return_kept:
            return "return_kept", "return_kept asks for positions, which the engine does not report"
        return "", ""


def role_of(transfer: ECTransferConfig | None) -> Role | None:
    """What an instance does in encoder disaggregation; None for one that does both, or takes no part."""
    if transfer is None or transfer.is_ec_producer == transfer.is_ec_consumer:
        return None
    return "producer" if transfer.is_ec_producer else "consumer"


def refuse_placement(engine: VllmConfig) -> None:
    """Raise in a worker that VTPRUNE_PLACEMENT has select what its engine cannot position.

    Raises:
        ValueError: names the variable.
    """
    obstacle = mrope_obstacle(engine) if engine.model_config.uses_mrope else ""
    if envs.placement() == "engine" and obstacle:
        raise ValueError(f"VTPRUNE_PLACEMENT=engine: {obstacle}; expected auto or api")


def mrope_obstacle(engine: VllmConfig) -> str:
    """Why an engine cannot position kept tokens of a model with M-RoPE; empty if it can."""
    if not engine.use_v2_model_runner:
        return "M-RoPE needs Model Runner V2, and the engine has V1"
    if engine.parallel_config.pipeline_parallel_size > 1:
        return "with pipeline parallelism, later ranks do not know the kept tokens, which M-RoPE needs"
    if engine.ec_transfer_config is not None:
        return "an encoder cache connector does not transfer the kept tokens, which M-RoPE needs"
    return ""

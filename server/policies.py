"""The policies that an operator sets up: presets by name, and the default of requests that name none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_vtprune.policy import EnergyBudget, MethodBudget, PolicyError, PruningPolicy
from vllm_vtprune.presets import builtin_presets
from vllm_vtprune.report import Placement

if TYPE_CHECKING:
    from vllm_vtprune.plugin.processor import PruningProcessor

DEFAULT_PARAM = "--pruning-default"


@dataclass(frozen=True)
class Policies:
    """What requests can refer to.

    Attributes:
        presets: policies by name.
        default: the policy of requests that name none.
        default_preset: the preset that the default is; None where it was written out, or where there is none.
        fixed_counts: the engine's option under which the number of tokens to keep must not depend on their features;
            empty where it may.
        chosen: the default and the operator's own presets, by option or name. The package's presets are not among them:
            nobody may ask for those.
    """

    presets: Mapping[str, PruningPolicy]
    default: PruningPolicy
    default_preset: str | None
    fixed_counts: str = ""
    chosen: Mapping[str, PruningPolicy] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        default: object = None,
        presets: Mapping[str, PruningPolicy] | None = None,
        *,
        fixed_counts: str = "",
    ) -> Policies:
        """The package's presets and those of the operator, which precede them.

        Args:
            default: a policy in any form that a request may use; None for no pruning.
            presets: more presets.
            fixed_counts: as the attribute.

        Raises:
            PolicyError: the default is not a policy, or not one that can be followed with `fixed_counts`.
        """
        known = builtin_presets() | dict(presets or {})
        policy = PruningPolicy.parse(default, param=DEFAULT_PARAM, presets=known)
        chosen = {DEFAULT_PARAM: policy, **(presets or {})}
        policies = cls(known, policy, default if isinstance(default, str) else None, fixed_counts, chosen)
        policies._refuse_counts(policy, DEFAULT_PARAM, default)
        return policies

    def placements(self, processor: PruningProcessor) -> set[Placement]:
        """Where the default and the operator's own presets select tokens; empty where they select none.

        Raises:
            PolicyError: the model cannot follow one of all presets, or its server one of these; names the option or
                preset, and the field.
        """
        for name, policy in self.presets.items():
            policy.resolve(processor.family, param=name)
        resolved = {name: policy.resolve(processor.family, param=name) for name, policy in self.chosen.items()}
        return {processor.place(policy, param=name)[0] for name, policy in resolved.items() if policy.selects}

    def parse(self, value: object, *, param: str = "pruning") -> PruningPolicy:
        """Read what a client wrote; None for the server's default.

        Raises:
            PolicyError: naming the first problem found.
        """
        policy = PruningPolicy.parse(value, param=param, presets=self.presets, default=self.default)
        self._refuse_counts(policy, param, value)
        return policy

    def _refuse_counts(self, policy: PruningPolicy, param: str, value: object) -> None:
        """Raise PolicyError for a count that depends on an image's features, where it must not."""
        if self.fixed_counts and policy.enabled and isinstance(policy.budget, EnergyBudget | MethodBudget):
            kind = policy.budget.type
            problem = f'a budget of the type "{kind}" cannot be used with {self.fixed_counts}: instances could disagree'
            raise PolicyError(param, value, 'a budget of the type "tokens" or "ratio"', problem)

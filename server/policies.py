"""The policies that an operator sets up: presets by name, and the default of requests that name none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_vtprune.policy import EnergyBudget, FamilyDefaults, MethodBudget, PolicyError, PruningPolicy
from vllm_vtprune.presets import builtin_presets

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
        selects: whether the default, or a preset of the operator's own, selects tokens. The package's presets do, and
            nobody may ask for them.
    """

    presets: Mapping[str, PruningPolicy]
    default: PruningPolicy
    default_preset: str | None
    fixed_counts: str = ""
    selects: bool = False

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
        selects = any(each.selects for each in (policy, *(presets or {}).values()))
        policies = cls(known, policy, default if isinstance(default, str) else None, fixed_counts, selects)
        policies._refuse_counts(policy, DEFAULT_PARAM, default)
        return policies

    def refuse_impossible(self, family: FamilyDefaults) -> None:
        """Raise for a policy that a model of this family cannot follow, before any request meets it.

        Raises:
            PolicyError: naming the option or preset, and the field.
        """
        for name, policy in {DEFAULT_PARAM: self.default, **self.presets}.items():
            policy.resolve(family, param=name)

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

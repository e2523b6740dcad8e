"""The policies that an operator sets up: presets by name, and the default of requests that name none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_vtprune.policy import FamilyDefaults, PruningPolicy
from vllm_vtprune.presets import builtin_presets

DEFAULT_PARAM = "--pruning-default"


@dataclass(frozen=True)
class Policies:
    """What requests can refer to.

    Attributes:
        presets: policies by name.
        default: the policy of requests that name none.
        default_preset: the preset that the default is; None where it was written out, or where there is none.
    """

    presets: Mapping[str, PruningPolicy]
    default: PruningPolicy
    default_preset: str | None

    @classmethod
    def of(cls, default: object = None, presets: Mapping[str, PruningPolicy] | None = None) -> Policies:
        """The package's presets and those of the operator, which precede them.

        Args:
            default: a policy in any form that a request may use; None for no pruning.
            presets: more presets.

        Raises:
            PolicyError: the default is not a policy.
        """
        known = builtin_presets() | dict(presets or {})
        policy = PruningPolicy.parse(default, param=DEFAULT_PARAM, presets=known)
        return cls(known, policy, default if isinstance(default, str) else None)

    def refuse_impossible(self, family: FamilyDefaults) -> None:
        """Raise for a policy that a model of this family cannot follow, before any request meets it.

        Raises:
            PolicyError: naming the option or preset, and the field.
        """
        for name, policy in {DEFAULT_PARAM: self.default, **self.presets}.items():
            policy.resolve(family, param=name)

    def parse(self, value: object, *, param: str = "pruning", default: PruningPolicy | None = None) -> PruningPolicy:
        """Read what a client wrote; None for ``default``, or without one for the server's.

        Raises:
            PolicyError: naming the first problem found.
        """
        return PruningPolicy.parse(value, param=param, presets=self.presets, default=default or self.default)

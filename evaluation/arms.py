"""The arms of a comparison: methods at fixed budgets, and "+E", the same with an energy budget of equal mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import BUILTIN_PRESETS, FamilyDefaults, PruningPolicy
from vllm_vtprune.selectors.registry import METHODS

Budget = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One policy in a comparison.

    Attributes:
        name: unique name.
        policy: the ``pruning`` field of its requests.
        method: its row in the tables.
        keep: kept tokens per picture (mean, if adaptive); None if not fixed.
        adaptive: whether an energy budget decides the count.
        inside: whether it prunes inside the language model, whose first layers read more than ``keep`` tokens.
    """

    name: str
    policy: Mapping[str, Any] | bool
    method: str
    keep: int | None = None
    adaptive: bool = False
    inside: bool = False

    def policy_for(self, picture: str) -> Mapping[str, Any] | bool:
        """The policy for a picture; random methods get a seed per picture, so that no single mask decides."""
        if not isinstance(self.policy, Mapping):
            return self.policy
        method = self.policy.get("method", "resprune")
        seeded = method in METHODS and METHODS[method].draws
        return {**self.policy, "seed": crc32(picture.encode())} if seeded else self.policy

    def digest(self) -> str:
        """The policy as canonical JSON."""
        return json.dumps(self.policy, sort_keys=True)


UNPRUNED = Arm("unpruned", False, "unpruned")


def fixed(keep: int) -> Budget:
    """A budget of ``keep`` tokens."""
    return {"type": "tokens", "keep": keep}


def energy(threshold: float) -> Budget:
    """E-AdaPrune's budget with the exact solver and no bounds."""
    return {"type": "energy", "threshold": threshold, "solver": "exact", "min_tokens": 1}


def usable(methods: Iterable[str], family: FamilyDefaults) -> list[str]:
    """The methods whose inputs the family provides."""
    return [method for method in methods if family.supports(METHODS[method])]


def grid(
    methods: Iterable[str], keeps: Sequence[int], thresholds: Mapping[int, float], sample: VisualFeatures
) -> list[Arm]:
    """Every method at every budget, and "+E" at the budgets in ``thresholds``.

    Omits budgets above a method's ``max_keep``, and energy budgets of methods that see no features.

    Args:
        methods: names of methods.
        keeps: tokens per picture.
        thresholds: mean tokens -> energy threshold.
        sample: features of any picture.
    """
    arms = []
    for method in methods:
        spec = METHODS[method]
        most = spec.max_keep(sample)
        for keep in keeps:
            if keep > most:
                continue
            arms.append(Arm(f"{method}@{keep}", {"method": method, "budget": fixed(keep)}, method, keep))
            # a cap would lower the mean
            if keep in thresholds and not spec.capped and not spec.preprocesses:
                budget = energy(thresholds[keep])
                arms.append(Arm(f"{method}+E@{keep}", {"method": method, "budget": budget}, method, keep, True))
    return arms


def own_counts(methods: Iterable[str]) -> list[Arm]:
    """The methods with their own count, at that count."""
    return [
        Arm(f"{method}@own", {"method": method, "budget": {"type": "method"}}, f"{method} (own count)")
        for method in methods
        if METHODS[method].own_count
    ]


def presets(names: Iterable[str]) -> list[Arm]:
    """The built-in presets with these names."""
    return [Arm(name, dict(BUILTIN_PRESETS[name]), name) for name in names]


def check(arms: Sequence[Arm]) -> None:
    """Validate arms.

    Raises:
        PolicyError: names the arm and the field.
        ValueError: names are not unique.
    """
    for arm in arms:
        PruningPolicy.parse(arm.policy, param=arm.name)
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"each arm must have a name of its own, got {names}")

"""Ways of pruning that are compared: methods at fixed budgets, and "+E", the same at an energy budget of equal mean."""

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
    """One way of pruning.

    Attributes:
        name: unique in a comparison.
        policy: the ``pruning`` field of its requests.
        method: the row of the tables that it belongs to.
        keep: the tokens of a picture that it keeps, on average where it adapts; None where nobody fixed them.
        adaptive: whether the energy budget decides how many.
        inside: whether it prunes inside the language model, whose first layers read more than ``keep``.
    """

    name: str
    policy: Mapping[str, Any] | bool
    method: str
    keep: int | None = None
    adaptive: bool = False
    inside: bool = False

    def policy_for(self, picture: str) -> Mapping[str, Any] | bool:
        """The policy for a picture of this label. What is random is drawn anew for each, else a lucky mask decides."""
        if not isinstance(self.policy, Mapping):
            return self.policy
        method = self.policy.get("method", "resprune")
        seeded = method in METHODS and METHODS[method].draws
        return {**self.policy, "seed": crc32(picture.encode())} if seeded else self.policy

    def digest(self) -> str:
        """What its answers depend on beside model and questions."""
        return json.dumps(self.policy, sort_keys=True)


UNPRUNED = Arm("unpruned", False, "unpruned")


def fixed(keep: int) -> Budget:
    """A budget of so many tokens."""
    return {"type": "tokens", "keep": keep}


def energy(threshold: float) -> Budget:
    """E-AdaPrune's budget, solved exactly, with no other bounds."""
    return {"type": "energy", "threshold": threshold, "solver": "exact", "min_tokens": 1}


def usable(methods: Iterable[str], family: FamilyDefaults) -> list[str]:
    """Those of the methods that a model of a family has all inputs for."""
    return [method for method in methods if family.supports(METHODS[method])]


def grid(
    methods: Iterable[str], keeps: Sequence[int], thresholds: Mapping[int, float], sample: VisualFeatures
) -> list[Arm]:
    """Every method at every budget, and "+E" at those budgets that ``thresholds`` has an energy threshold for.

    Budgets that a method cannot reach (``max_keep``) are left out, and energy budgets of those that see no features.

    Args:
        methods: by name.
        keeps: tokens of a picture.
        thresholds: by the mean tokens that they lead to.
        sample: of a picture of the model.
    """
    arms = []
    for method in methods:
        spec = METHODS[method]
        most = spec.max_keep(sample)
        for keep in keeps:
            if keep > most:
                continue
            arms.append(Arm(f"{method}@{keep}", {"method": method, "budget": fixed(keep)}, method, keep))
            # a bound would take tokens from the mean
            if keep in thresholds and not spec.capped and not spec.preprocesses:
                budget = energy(thresholds[keep])
                arms.append(Arm(f"{method}+E@{keep}", {"method": method, "budget": budget}, method, keep, True))
    return arms


def own_counts(methods: Iterable[str]) -> list[Arm]:
    """The methods that find their own count, left to do so."""
    return [
        Arm(f"{method}@own", {"method": method, "budget": {"type": "method"}}, f"{method} (own count)")
        for method in methods
        if METHODS[method].own_count
    ]


def presets(names: Iterable[str]) -> list[Arm]:
    """The presets that come with the package."""
    return [Arm(name, dict(BUILTIN_PRESETS[name]), name) for name in names]


def check(arms: Sequence[Arm]) -> None:
    """Raise for an arm whose policy is none.

    Raises:
        PolicyError: naming the arm and the field.
        ValueError: two arms have one name.
    """
    for arm in arms:
        PruningPolicy.parse(arm.policy, param=arm.name)
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"each arm must have a name of its own, got {names}")

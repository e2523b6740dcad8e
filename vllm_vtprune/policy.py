"""The pruning policy: what a client may ask for, and the one place where it is validated.

Importing this module needs pydantic but neither torch nor vLLM. Everything behind it trusts its types.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, Union, get_args

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, RootModel, model_validator

from vllm_vtprune.options import (
    MAX_QUERY_CHARS,
    MAX_TOKENS,
    Budget,
    EnergyBudget,
    MethodBudget,
    PolicyError,
    RatioBudget,
    Strict,
    TextOptions,
    TokensBudget,
    read,
    refuse_unknown,
    shown,
)
from vllm_vtprune.selectors.method import FamilyDefaults, Input, Method, Needs
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune.selectors.resprune import ResPrune

__all__ = [
    "BUILTIN_PRESETS", "LLAVA", "MAX_QUERY_CHARS", "MAX_TOKENS", "NONE", "OFF", "Budget", "EnergyBudget",
    "FamilyDefaults", "MethodBudget", "PolicyError", "PruningPolicy", "RatioBudget", "TextOptions", "TokensBudget",
]  # fmt: skip

NONE = "none"  # the method that keeps every token

LLAVA = FamilyDefaults(clip_alpha=0.75, provides=frozenset({"cls_attention", "keys", "grid", "positions"}))


class NoPruning(Strict):
    """Every token is kept."""

    method: Literal["none"] = "none"
    used: ClassVar[frozenset[str]] = frozenset({"method"})


if TYPE_CHECKING:
    AnyMethod: TypeAlias = Method | NoPruning
else:
    AnyMethod = Annotated[Union[(*METHODS.values(), NoPruning)], Field(discriminator="method")]

_OWNERS = {name: method for method in METHODS.values() for name in method.model_fields}  # a method that has the field
_OWNERS["seed"] = _OWNERS.pop("seed")  # the last in a list of fields


class PruningPolicy(RootModel[AnyMethod]):
    """How many visual tokens to keep and which: a method with its parameters and a budget. Default: resprune."""

    model_config = ConfigDict(frozen=True)

    root: AnyMethod = ResPrune()

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_method(cls, value: object, handler: ModelWrapValidatorHandler[PruningPolicy]) -> PruningPolicy:
        """Let ``method`` default to resprune, and accept fields that it does not use at their defaults."""
        if not isinstance(value, Mapping):
            return handler(value)
        refuse_unknown(value, _OWNERS)
        name = value.get("method", ResPrune().method)
        if name != NONE and (not isinstance(name, str) or name not in METHODS):
            raise PolicyError("method", name, "one of " + ", ".join([NONE, *METHODS]))
        fields = METHODS[name].model_fields if name != NONE else NoPruning.model_fields
        policy = handler({**{key: each for key, each in value.items() if key in fields}, "method": name})
        for key, owner in _OWNERS.items():
            if key in value and key not in policy.root.used:
                unused = read(owner, {key: value[key]})
                if getattr(unused, key) != owner.model_fields[key].default:
                    given = unused.model_dump()[key]
                    problem = f"{shown(given)} given, but method {name} does not use {key}"
                    others = ", ".join(sorted(policy.root.used - {"method"})) or "nothing else"
                    raise PolicyError(key, given, f"{others} beside this method", problem)
        return policy

    @model_validator(mode="after")
    def _budget_suits_the_method(self) -> PruningPolicy:
        kind = self.budget.type
        if self.enabled and self.chosen.preprocesses and kind not in ("tokens", "ratio"):
            problem = f'"{kind}" needs features, before which method {self.method} scales the picture'
            raise PolicyError("budget.type", kind, "one of tokens, ratio", problem)
        if kind == "method" and not self.chosen.own_count:
            own = ", ".join(name for name, method in METHODS.items() if method.own_count)
            problem = f'"method" is only for methods with a count of their own ({own}), and {self.method} has none'
            raise PolicyError("budget.type", kind, "one of energy, ratio, tokens", problem)
        return self

    @classmethod
    def parse(
        cls,
        value: object,
        *,
        param: str = "pruning",
        presets: Mapping[str, Mapping[str, Any] | PruningPolicy] | None = None,
        default: PruningPolicy | None = None,
    ) -> PruningPolicy:
        """Read a policy from what a client wrote.

        Args:
            value: a mapping with any of the policy's fields, the name of a preset, ``False`` for no pruning, or None
                where the client wrote nothing.
            param: name of the field that held ``value``; begins the path in an error.
            presets: presets by name; None for :data:`BUILTIN_PRESETS`.
            default: the policy for None; without one, None means no pruning.

        Raises:
            PolicyError: naming the first problem found.
        """
        presets = BUILTIN_PRESETS if presets is None else presets
        if value is None or value is False:
            return default if value is None and default is not None else OFF
        if isinstance(value, str) and value in presets:
            value = presets[value]
        if isinstance(value, PruningPolicy):
            return value
        if not isinstance(value, Mapping):
            raise PolicyError(param, value, "an object, false, or a preset: " + ", ".join(presets))
        try:
            return read(cls, value)
        except PolicyError as error:
            problem = error.under(param)
        raise problem

    @property
    def method(self) -> str:
        return self.root.method

    @property
    def enabled(self) -> bool:
        """Whether any token may be pruned."""
        return isinstance(self.root, Method)

    @property
    def chosen(self) -> Method:
        """The method with its parameters; only for an enabled policy."""
        assert isinstance(self.root, Method)
        return self.root

    @property
    def budget(self) -> Budget:
        return self.root.budget if isinstance(self.root, Method) else EnergyBudget()

    @property
    def text(self) -> TextOptions:
        """Where the text comes from, also for a method that reads none."""
        return getattr(self.root, "text", TextOptions())

    @property
    def selects(self) -> bool:
        """Whether tokens are chosen among those of the encoded image."""
        return self.enabled and not self.chosen.preprocesses

    @property
    def conditions_on_text(self) -> bool:
        """Whether the text can change which tokens are kept."""
        return self.enabled and "text" in self.reads

    @property
    def reads(self) -> frozenset[Input]:
        """The inputs, beside ``embeds``, that can change which tokens are kept; only for an enabled policy."""
        return (self.chosen.needs | self.chosen.uses) - self.chosen.idle()

    def with_budget(self, budget: Budget) -> PruningPolicy:
        """The same method with another budget."""
        return PruningPolicy(self.chosen.model_copy(update={"budget": budget}))

    def resolve(self, family: FamilyDefaults, *, param: str = "pruning") -> PruningPolicy:
        """The policy with a value in the place of every ``null`` and ``auto`` that the method reads.

        Raises:
            PolicyError: when the method, or the value of a parameter, needs an input that the family does not provide.
        """
        if not self.enabled:
            return self
        method = self.chosen
        for source in sorted(method.needs - family.inputs):
            problem = f"method {self.method} needs {source}, which this model does not have"
            accepted = "one of " + ", ".join([NONE, *(name for name, each in METHODS.items() if family.supports(each))])
            raise PolicyError(f"{param}.method", self.method, accepted, problem)
        for name, field in type(method).model_fields.items():
            value = getattr(method, name)
            for needs in (each for each in field.metadata if isinstance(each, Needs)):
                if needs.get(value) not in (None, *family.inputs):
                    problem = f'"{value}" needs {needs[value]}, which this model\'s vision tower does not give'
                    others = [each for each in get_args(field.annotation) if needs.get(each) in (None, *family.inputs)]
                    raise PolicyError(f"{param}.{name}", value, " or ".join(f'"{each}"' for each in others), problem)
        defaults = method.defaults(family).items()
        filled = {name: value for name, value in defaults if getattr(method, name) in (None, "auto")}
        return PruningPolicy(method.model_copy(update=filled))

    def selection_digest(self) -> str:
        """32 hex digits that are equal for policies which keep the same tokens of the same features and text.

        Parameters that cannot change the picks, and ``text``, are left out. Call it on a :meth:`resolve`-d policy:
        ``alpha: null`` and the family's own alpha are the same only there.
        """
        chosen: dict[str, Any] = {"method": self.method}
        if self.enabled:
            names = self.root.used - self.chosen.idle() - {"text"}
            chosen |= {name: getattr(self.chosen, name) for name in names}
            unread = isinstance(self.budget, EnergyBudget) and self.budget.solver != "rsvd"
            chosen["budget"] = self.budget.model_dump(exclude={"rank", "power_iterations"} if unread else None)
        # adding 0 turns -0.0 into 0.0
        plain = {name: value + 0 if isinstance(value, float) else value for name, value in chosen.items()}
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def dump(self) -> dict[str, Any]:
        """The policy as JSON values: the fields its method reads. :meth:`parse` reads it back."""
        return self.root.model_dump(include=set(self.root.used))


BUILTIN_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "off": {"method": NONE},
        "quality": {"budget": {"type": "energy", "threshold": 0.998, "min_tokens": 192}},
        "balanced": {"budget": {"type": "energy", "threshold": 0.99, "min_tokens": 128}},
        "fast": {"budget": {"type": "ratio", "keep": 1 / 9}},
        "document": {"budget": {"type": "energy", "threshold": 0.998, "min_tokens": 256}},
    }
)
"""The presets that come with the package.

The thresholds are E-AdaPrune's. Energy alone is no safe budget, since features of few directions hold all of it in few
tokens: so each has a floor, chosen on validation scenes with the demo model (docs/policy.md).
"""

OFF = PruningPolicy(NoPruning())

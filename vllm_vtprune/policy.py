"""The pruning policy, and the only place where it is validated. Other code trusts its types.

Importing this module needs pydantic but neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
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
    unknown_value,
)
from vllm_vtprune.selectors.method import LOSSLESS, FamilyDefaults, Input, Method, Needs
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune.selectors.resprune import ResPrune

__all__ = [
    "BUILTIN_PRESETS", "LLAVA", "MAX_QUERY_CHARS", "MAX_TOKENS", "NONE", "OFF", "POLICY_FIELDS", "Budget",
    "EnergyBudget", "FamilyDefaults", "MethodBudget", "PolicyError", "PruningPolicy", "RatioBudget", "TextOptions",
    "TokensBudget", "preset_of",
]  # fmt: skip

NONE = "none"  # the method that keeps every token
PRESET = "preset"
"""Key of an object that names a preset in place of a policy."""

LLAVA = FamilyDefaults(clip_alpha=0.75, provides=frozenset({"cls_attention", "keys", "grid", "positions"}))


class NoPruning(Strict):
    """Every token is kept."""

    method: Literal["none"] = "none"
    used: ClassVar[frozenset[str]] = frozenset({"method"})


if TYPE_CHECKING:
    AnyMethod: TypeAlias = Method | NoPruning
else:
    AnyMethod = Annotated[Union[(*METHODS.values(), NoPruning)], Field(discriminator="method")]

_OWNERS = {name: method for method in METHODS.values() for name in method.model_fields}  # field -> a method that has it
for _name in ("seed", *LOSSLESS):
    _OWNERS[_name] = _OWNERS.pop(_name)  # listed last in errors
POLICY_FIELDS = tuple(_OWNERS)
"""The fields of all methods."""


class PruningPolicy(RootModel[AnyMethod]):
    """How many visual tokens to keep and which: a method with its parameters and a budget. Default: resprune."""

    model_config = ConfigDict(frozen=True)

    root: AnyMethod = ResPrune()

    @model_validator(mode="wrap")
    @classmethod
    def _check_fields(cls, value: object, handler: ModelWrapValidatorHandler[PruningPolicy]) -> PruningPolicy:
        """Default ``method`` to resprune; accept fields that the method does not use only at their defaults."""
        if not isinstance(value, Mapping):
            return handler(value)
        refuse_unknown(value, _OWNERS if PRESET in value else [*_OWNERS, PRESET])  # `parse` has replaced it
        name = value.get("method", ResPrune().method)
        if name != NONE and (not isinstance(name, str) or name not in METHODS):
            names = [NONE, *METHODS]
            raise PolicyError("method", name, "one of " + ", ".join(names), unknown_value(name, names))
        fields = METHODS[name].model_fields if name != NONE else NoPruning.model_fields
        policy = handler({**{key: item for key, item in value.items() if key in fields}, "method": name})
        for key, owner in _OWNERS.items():
            if key in value and key not in policy.root.used:
                unused = read(owner, {key: value[key]})
                if getattr(unused, key) != owner.model_fields[key].default:
                    parsed = unused.model_dump()[key]
                    problem = f"{shown(parsed)} given, but method {name} does not use {key}"
                    accepted = ", ".join(sorted(policy.root.used - {"method"})) or "nothing else"
                    raise PolicyError(key, parsed, f"{accepted} beside this method", problem)
        return policy

    @model_validator(mode="after")
    def _check_lossless(self) -> PruningPolicy:
        for name in LOSSLESS:
            if self.enabled and self.chosen.preprocesses and getattr(self.chosen, name):
                problem = f"true given, but method {self.method} resizes the whole image and selects no tokens"
                raise PolicyError(name, True, "false", problem)
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> PruningPolicy:
        kind = self.budget.type
        if self.enabled and self.chosen.preprocesses and self.budget.needs_features:
            field, value, accepted = self.featureless_budget()
            problem = f'"{value}" needs features, but method {self.method} runs before encoding'
            raise PolicyError(f"budget.{field}", value, accepted, problem)
        if kind == "method" and not self.chosen.own_count:
            names = ", ".join(name for name, method in METHODS.items() if method.own_count)
            problem = f'"method" is only for methods with a count of their own ({names}), and {self.method} has none'
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
        """Parse a policy.

        Args:
            value: a mapping with any of the policy's fields, the name of a preset (also as ``{"preset": NAME}``),
                ``False`` for no pruning, or None if the field was absent.
            param: name of the field that held ``value``; begins the path in an error.
            presets: presets by name; None: :data:`BUILTIN_PRESETS`.
            default: the policy for None; without it, None means no pruning.

        Raises:
            PolicyError: names the first problem.
        """
        presets = BUILTIN_PRESETS if presets is None else presets
        value = without_preset(value, presets, param)
        if value is None or value is False:
            return default if value is None and default is not None else OFF
        if isinstance(value, str) and value in presets:
            value = presets[value]
        if isinstance(value, PruningPolicy):
            return value
        if not isinstance(value, Mapping):
            accepted = "an object, false, or a preset: " + ", ".join(presets)
            raise PolicyError(param, value, accepted, unknown_value(value, presets))
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
        """The text options; defaults for a method without text."""
        return getattr(self.root, "text", TextOptions())

    @property
    def selects(self) -> bool:
        """Whether tokens of the encoded image are selected."""
        return self.enabled and not self.chosen.preprocesses

    @property
    def conditions_on_text(self) -> bool:
        """Whether the text can change which tokens are kept."""
        return self.enabled and "text" in self.reads

    @property
    def reads(self) -> frozenset[Input]:
        """The inputs, besides ``embeds``, that can change which tokens are kept; only for an enabled policy."""
        return (self.chosen.needs | self.chosen.uses) - self.chosen.idle()

    def with_budget(self, budget: Budget) -> PruningPolicy:
        """The same method with another budget."""
        return PruningPolicy(self.chosen.model_copy(update={"budget": budget}))

    def featureless_budget(self) -> tuple[str, str, str]:
        """Of a budget that needs features: the field to change, its value, and what would need none."""
        if self.budget.scope == "request":
            return "scope", "request", '"image"'
        return "type", self.budget.type, '"tokens" or "ratio"'

    def refuse_request_scope(self, param: str) -> None:
        """Raise PolicyError if this policy, of a single image, has a budget for all images of a request.

        Args:
            param: path of the policy.
        """
        if self.enabled and self.budget.scope == "request":
            problem = '"request" divides one budget over the images of a request, and this policy is of one image'
            raise PolicyError(f"{param}.budget.scope", "request", '"image", or this policy for the request', problem)

    def resolve(self, family: FamilyDefaults, *, param: str = "pruning") -> PruningPolicy:
        """Replace every ``null`` and ``auto`` that the method reads by its value.

        Args:
            family: defaults of the model family.
            param: path of the policy in errors.

        Raises:
            PolicyError: the method or a parameter's value needs an input that the family does not provide.
        """
        if not self.enabled:
            return self
        method = self.chosen
        lost = {"grid", "positions"} if method.dedup and family.drops_duplicates else set[Input]()
        for source in sorted((method.needs | method.uses & {"positions"}) & lost):
            problem = f"true given, but method {self.method} needs {source}, which dedup leaves incomplete"
            raise PolicyError(f"{param}.dedup", True, "false", problem)
        family = replace(family, provides=family.provides - lost)
        for source in sorted(method.needs - family.inputs):
            problem = f"method {self.method} needs {source}, which this model does not have"
            supported = [name for name, other in METHODS.items() if family.supports(other)]
            raise PolicyError(f"{param}.method", self.method, "one of " + ", ".join([NONE, *supported]), problem)
        available = (None, *family.inputs)
        for name, field in type(method).model_fields.items():
            value = getattr(method, name)
            for needs in (metadata for metadata in field.metadata if isinstance(metadata, Needs)):
                if needs.get(value) not in available:
                    problem = f'"{value}" needs {needs[value]}, which this model\'s vision encoder does not provide'
                    options = [option for option in get_args(field.annotation) if needs.get(option) in available]
                    accepted = " or ".join(f'"{option}"' for option in options)
                    raise PolicyError(f"{param}.{name}", value, accepted, problem)
        defaults = method.defaults(family).items()
        filled = {name: value for name, value in defaults if getattr(method, name) in (None, "auto")}
        return PruningPolicy(method.model_copy(update=filled))

    def selection_digest(self) -> str:
        """32 hex digits, equal for policies that keep the same tokens of the same features and text.

        Omits ``text`` and parameters that cannot change the selection. Call it on a :meth:`resolve`-d policy, in which
        ``alpha: null`` and the default alpha are equal.
        """
        fields: dict[str, Any] = {"method": self.method}
        if self.enabled:
            names = self.root.used - self.chosen.idle() - {"text"}
            fields |= {name: getattr(self.chosen, name) for name in names}
            rank_unused = isinstance(self.budget, EnergyBudget) and self.budget.solver != "rsvd"
            fields["budget"] = self.budget.model_dump(exclude={"rank", "power_iterations"} if rank_unused else None)
        # adding 0 turns -0.0 into 0.0
        plain = {name: value + 0 if isinstance(value, float) else value for name, value in fields.items()}
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def dump(self) -> dict[str, Any]:
        """The fields that the method uses, as JSON values; :meth:`parse` is the inverse."""
        return self.root.model_dump(include=set(self.root.used))


def preset_of(value: object) -> str | None:
    """The preset that a policy names, as it is written; None if it names none."""
    name = value.get(PRESET) if isinstance(value, Mapping) else value
    return name if isinstance(name, str) else None


def without_preset(value: object, presets: Collection[str], param: str) -> object:
    """What an object means without its key ``preset``: the name there, or if that is null what stands beside it.

    Args:
        value: a policy as for `PruningPolicy.parse`; without the key, it is returned as it is.
        presets: names of the presets.
        param: name of the field that held ``value``.

    Raises:
        PolicyError: there is no such preset, or fields of a policy stand beside it.
    """
    if not isinstance(value, Mapping) or PRESET not in value:
        return value
    name, fields = value[PRESET], {key: item for key, item in value.items() if key != PRESET}
    if name is None:
        return fields
    if not isinstance(name, str) or name not in presets:
        raise PolicyError(f"{param}.{PRESET}", name, "one of " + ", ".join(presets), unknown_value(name, presets))
    for key, item in fields.items():
        problem = f"{key} given beside a preset, which is a whole policy"
        raise PolicyError(f"{param}.{key}", item, f"no field of a policy beside {PRESET}", problem)
    return name


BUILTIN_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "off": {"method": NONE},
        "quality": {"budget": {"type": "energy", "threshold": 0.998, "min_tokens": 192}},
        "balanced": {"budget": {"type": "energy", "threshold": 0.99, "min_tokens": 128}},
        "fast": {"budget": {"type": "ratio", "keep": 1 / 9}},
        "document": {"budget": {"type": "energy", "threshold": 0.998, "min_tokens": 256}},
    }
)
"""The built-in presets.

Thresholds are E-AdaPrune's. Energy alone is not a safe budget: low-rank features reach any threshold with few tokens.
So each preset has a floor, chosen on validation scenes with the demo model (docs/policy.md).
"""

OFF = PruningPolicy(NoPruning())

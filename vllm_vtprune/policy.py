"""The pruning policy: what a client may ask for, and the one place where it is validated.

Importing this module needs pydantic but neither torch nor vLLM. Everything behind it trusts its types.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from vllm_vtprune.selectors.registry import METHODS, Input, MethodSpec

NONE = "none"  # the method that keeps every token
MAX_QUERY_CHARS = 4096
MAX_TOKENS = 1_000_000

_SHOWN_CHARS = 200  # of a rejected value, in a message
_SHOWN_KEY_CHARS = 64  # of an unknown key, in a path


class PolicyError(ValueError):
    """A policy that cannot be used; ``str()`` is one sentence that names field, value and what is accepted.

    Attributes:
        param: path of the field as the client wrote it, such as ``pruning.budget.threshold``.
        value: what was given there.
        accepted: what would be accepted, in words.
    """

    def __init__(self, param: str, value: object, accepted: str, problem: str | None = None) -> None:
        super().__init__(param, value, accepted, problem)
        self.param = param
        self.value = value
        self.accepted = accepted
        self.problem = problem

    def __str__(self) -> str:
        problem = self.problem or f"{_show(self.value)} is not accepted"
        return f"{self.param}: {problem}; expected {self.accepted}."

    def under(self, param: str) -> PolicyError:
        """The same error with ``param`` put before its path."""
        path = ".".join(part for part in (param, self.param) if part)
        return PolicyError(path, self.value, self.accepted, self.problem)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        if isinstance(data, Mapping):
            for key, value in data.items():
                if key not in cls.model_fields:
                    accepted = "one of " + ", ".join(cls.model_fields)
                    raise PolicyError(_show_key(key), value, accepted, f"unknown field{_meant(key, cls.model_fields)}")
        return data


class EnergyBudget(_Strict):
    """As many tokens as the image's spectral energy asks for (E-AdaPrune), clamped to ``min_tokens..max_tokens``."""

    type: Literal["energy"] = "energy"
    threshold: float = Field(default=0.99, gt=0, le=1, description="a number above 0 and at most 1")
    min_tokens: int = Field(default=32, ge=1, le=MAX_TOKENS, description=f"an integer from 1 to {MAX_TOKENS}")
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description=f"null or an integer from 1 to {MAX_TOKENS}"
    )
    solver: Literal["auto", "exact", "rsvd"] = Field(default="auto", description='"auto", "exact" or "rsvd"')
    rank: int = Field(default=300, ge=1, le=65536, description="an integer from 1 to 65536")
    power_iterations: int = Field(default=2, ge=0, le=16, description="an integer from 0 to 16")

    @model_validator(mode="after")
    def _min_at_most_max(self) -> EnergyBudget:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            if "min_tokens" in self.model_fields_set:
                raise PolicyError(
                    "min_tokens", self.min_tokens, f"an integer from 1 to max_tokens, which is {self.max_tokens}"
                )
            raise PolicyError(
                "max_tokens",
                self.max_tokens,
                f"an integer not below min_tokens, whose default is {self.min_tokens} (set min_tokens too to go lower)",
            )
        return self


class RatioBudget(_Strict):
    """A fixed share of the image's tokens: ``keep * N`` rounded half up, at least 1."""

    type: Literal["ratio"] = "ratio"
    keep: float = Field(gt=0, le=1, description="a number above 0 and at most 1")


class TokensBudget(_Strict):
    """A fixed number of tokens, or all of them where the image has fewer."""

    type: Literal["tokens"] = "tokens"
    keep: int = Field(ge=1, le=MAX_TOKENS, description=f"an integer from 1 to {MAX_TOKENS}")


class MethodBudget(_Strict):
    """The count that the method finds by itself."""

    type: Literal["method"] = "method"


Budget: TypeAlias = EnergyBudget | RatioBudget | TokensBudget | MethodBudget

_BUDGETS: dict[str, type[Budget]] = {
    "energy": EnergyBudget,
    "ratio": RatioBudget,
    "tokens": TokensBudget,
    "method": MethodBudget,
}


class TextOptions(_Strict):
    """Where the text that an image is conditioned on comes from.

    ``message``: the message that carries the image. ``last_turn``: the conversation's last user message. ``query``
    overrides both. ``clean=False`` uses every word instead of the nouns of the question; ``modifiers=True``, the nouns
    with their adjectives and numbers, and changes nothing beside ``clean=False``.
    """

    scope: Literal["message", "last_turn"] = Field(default="message", description='"message" or "last_turn"')
    query: str | None = Field(
        default=None,
        max_length=MAX_QUERY_CHARS,
        description=f"null or a string of at most {MAX_QUERY_CHARS} characters",
    )
    clean: bool = Field(default=True, description="true or false")
    modifiers: bool = Field(default=True, description="true or false")


@dataclass(frozen=True)
class FamilyDefaults:
    """What a model family puts in the place of ``null`` and ``auto``.

    Attributes:
        clip_alpha: strength of the text's guidance under the gate ``clip``, the paper's; others declare their own.
        provides: what methods may need that the family has: the inputs, beside the two feature matrices, that its
            tower gives, and dynamic resolution.
    """

    clip_alpha: float
    provides: frozenset[Input]

    @property
    def inputs(self) -> frozenset[Input]:
        """All that methods may need, and that there is."""
        return self.provides | {"text", "encoder"}

    def supports(self, method: MethodSpec) -> bool:
        """Whether the family has what a method needs."""
        return method.needs <= self.inputs


_CHOICES_THAT_NEED: dict[tuple[str, str], Input] = {
    ("seed_token", "cls"): "cls_attention",
    ("seed_token", "center"): "grid",
    ("importance", "cls"): "cls_attention",
    ("features", "encoder"): "encoder",
    ("features", "both"): "encoder",
}

LLAVA = FamilyDefaults(clip_alpha=0.75, provides=frozenset({"cls_attention", "keys", "grid", "positions"}))

DEFAULT_GATE = "minmax"
GATE_ALPHAS: Mapping[str, float] = MappingProxyType({"minmax": 0.5})
"""Strength of the text's guidance by gate; that of ``clip`` is the family's."""

_POSITIVE = "null or a number above 0"
_SWITCH = "true or false"


class PruningPolicy(_Strict):
    """How many visual tokens to keep and which. The fields and their defaults are the ``pruning`` field of a request.

    Use :meth:`parse` for anything a client wrote; the constructor is for code and raises pydantic's errors.
    """

    method: str = Field(default="resprune", description="one of " + ", ".join([NONE, *METHODS]))
    budget: Annotated[Budget, Field(discriminator="type")] = Field(
        default=EnergyBudget(), description="an object whose type is " + ", ".join(_BUDGETS)
    )
    text: TextOptions = Field(
        default=TextOptions(), description="an object with any of " + ", ".join(TextOptions.model_fields)
    )
    gate: Literal["auto", "minmax", "clip"] = Field(default="auto", description='"auto", "minmax" or "clip"')
    alpha: float | None = Field(default=None, ge=0, le=16, description="null or a number from 0 to 16")
    relevance: Literal["max", "mean", "mean_token"] = Field(default="max", description='"max", "mean" or "mean_token"')
    seed_token: Literal["auto", "cls", "norm", "relevance", "mean", "center"] = Field(
        default="auto", description='"auto", "cls", "norm", "relevance", "mean" or "center"'
    )
    rank_by: Literal["residual", "relevance"] = Field(default="residual", description='"residual" or "relevance"')
    features: Literal["projected", "encoder", "both"] = Field(
        default="projected", description='"projected", "encoder" or "both"'
    )
    importance: Literal["auto", "cls", "relevance", "norm", "residual"] = Field(
        default="auto", description='"auto", "cls", "relevance", "norm" or "residual"'
    )
    sigma_d: float | None = Field(default=None, gt=0, description=_POSITIVE)
    sigma_s: float | None = Field(default=None, gt=0, description=_POSITIVE)
    radius: float | None = Field(default=None, gt=0, description=_POSITIVE)
    correction: bool = Field(default=True, description=_SWITCH)
    distance: bool = Field(default=True, description=_SWITCH)
    similarity: bool = Field(default=True, description=_SWITCH)
    seed: int = Field(default=0, ge=0, lt=2**63, description="an integer from 0 to 2**63 - 1")

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value != NONE and value not in METHODS:
            raise PolicyError("", value, "one of " + ", ".join([NONE, *METHODS]))
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _known_budget_keys(cls, value: object) -> object:
        """Name the type a misplaced key belongs to, and let ``type`` default to ``energy``."""
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, Mapping):
            raise PolicyError("", value, "an object whose type is one of " + ", ".join(_BUDGETS))
        kind = value.get("type", "energy")
        if not isinstance(kind, str) or kind not in _BUDGETS:
            raise PolicyError("type", kind, "one of " + ", ".join(_BUDGETS))
        for key in value:
            owners = [name for name, model in _BUDGETS.items() if key in model.model_fields]
            if owners and kind not in owners:
                raise PolicyError(
                    key,
                    value[key],
                    "one of " + ", ".join(_BUDGETS[kind].model_fields),
                    f"{_show(value[key])} given, but {key} belongs to budget type {' or '.join(owners)}, "
                    f"and this budget is of type {kind}",
                )
        return {**value, "type": kind}

    @model_validator(mode="after")
    def _only_what_the_method_uses(self) -> PruningPolicy:
        used = self._used
        for name, field in type(self).model_fields.items():
            if name in used or getattr(self, name) == field.default:
                continue
            value = self.model_dump(include={name})[name]
            others = ", ".join(sorted(used - {"method"})) or "nothing else"
            raise PolicyError(
                name,
                value,
                f"{others} beside this method",
                f"{_show(value)} given, but method {self.method} does not use {name}",
            )
        if self.enabled and self.spec.preprocesses and not isinstance(self.budget, TokensBudget | RatioBudget):
            raise PolicyError(
                "budget.type",
                self.budget.type,
                "one of tokens, ratio",
                f'"{self.budget.type}" needs features, before which method {self.method} scales the picture',
            )
        if self.budget.type == "method" and not METHODS[self.method].own_count:
            own = ", ".join(name for name, spec in METHODS.items() if spec.own_count) or "no method so far"
            raise PolicyError(
                "budget.type",
                "method",
                "one of energy, ratio, tokens",
                f'"method" is only for methods with a count of their own ({own}), and {self.method} has none',
            )
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
        if isinstance(value, PruningPolicy):
            return value
        if value is None:
            return OFF if default is None else default
        if value is False:
            return OFF
        if isinstance(value, str):
            if value not in presets:
                raise PolicyError(param, value, "an object, false, or a preset: " + ", ".join(presets))
            preset = presets[value]
            return preset if isinstance(preset, PruningPolicy) else cls._from_mapping(preset, param)
        if isinstance(value, Mapping):
            return cls._from_mapping(value, param)
        raise PolicyError(param, value, "an object, false, or a preset: " + ", ".join(presets))

    @classmethod
    def _from_mapping(cls, value: Mapping[str, Any], param: str) -> PruningPolicy:
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            details = error.errors(include_url=False)
        raise _first_problem(details[0]).under(param)

    @property
    def enabled(self) -> bool:
        """Whether any token may be pruned."""
        return self.method != NONE

    @property
    def selects(self) -> bool:
        """Whether tokens are chosen among those of the encoded image."""
        return self.enabled and not self.spec.preprocesses

    @property
    def spec(self) -> MethodSpec:
        """The method's row in the registry; only for an enabled policy."""
        return METHODS[self.method]

    @property
    def conditions_on_text(self) -> bool:
        """Whether the text can change which tokens are kept."""
        return self.enabled and "text" in self.reads

    @property
    def reads(self) -> frozenset[Input]:
        """The inputs, beside ``embeds``, that can change which tokens are kept; only for an enabled policy."""
        return self.spec.reads - self.spec.idle(self)

    @property
    def _used(self) -> frozenset[str]:
        """The fields that the method and the budget's solver read."""
        if not self.enabled:
            return frozenset({"method"})
        seed = {"seed"} if _may_randomise(self.budget) else set()
        return self.spec.parameters | {"method", "budget"} | seed

    def resolve(self, family: FamilyDefaults, *, param: str = "pruning") -> PruningPolicy:
        """The policy with a value in the place of every ``null`` and ``auto`` that the method reads.

        Raises:
            PolicyError: when the method, or the seed token, importance or features asked for, need an input that the
                family does not provide.
        """
        if not self.enabled:
            return self
        auto = "cls" if "cls_attention" in family.provides else "norm"
        gate = DEFAULT_GATE if self.gate == "auto" else self.gate
        alpha = GATE_ALPHAS.get(gate, family.clip_alpha)
        fallback = {"gate": gate, "alpha": alpha, "seed_token": auto, "importance": auto, **self.spec.defaults}
        filled = {
            name: value
            for name, value in fallback.items()
            if name in self.spec.parameters and getattr(self, name) in (None, "auto")
        }
        for source in sorted(self.spec.needs - family.inputs):
            problem = f"method {self.method} needs {source}, which this model does not have"
            accepted = "one of " + ", ".join([NONE, *(name for name, spec in METHODS.items() if family.supports(spec))])
            raise PolicyError(f"{param}.method", self.method, accepted, problem)
        for (name, value), source in _CHOICES_THAT_NEED.items():
            if getattr(self, name) == value and source not in family.inputs:
                problem = f'"{value}" needs {source}, which this model\'s vision tower does not give'
                values = get_args(type(self).model_fields[name].annotation)
                others = [f'"{one}"' for one in values if _CHOICES_THAT_NEED.get((name, one)) in (None, *family.inputs)]
                raise PolicyError(f"{param}.{name}", value, " or ".join(others), problem)
        return self.model_copy(update=filled)

    def selection_digest(self) -> str:
        """32 hex digits that are equal for policies which keep the same tokens of the same features and text.

        Parameters that cannot change the picks, and ``text``, are left out. Call it on a :meth:`resolve`-d policy:
        ``alpha: null`` and the family's own alpha are the same only there.
        """
        chosen: dict[str, Any] = {"method": self.method}
        if self.enabled:
            names = self._used - self.spec.idle(self) - {"text"}
            chosen |= {name: getattr(self, name) for name in names}
            unread = isinstance(self.budget, EnergyBudget) and self.budget.solver != "rsvd"
            chosen["budget"] = self.budget.model_dump(exclude={"rank", "power_iterations"} if unread else None)
        # adding 0 turns -0.0 into 0.0
        plain = {name: value + 0 if isinstance(value, float) else value for name, value in chosen.items()}
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def dump(self) -> dict[str, Any]:
        """The policy as JSON values: the fields its method reads. :meth:`parse` reads it back."""
        return self.model_dump(include=set(self._used))


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

The thresholds are E-AdaPrune's two (284 and 150 of 576 tokens on average in its paper). Energy alone is no safe
budget, since features of few directions hold all of it in few tokens, so each has a floor, chosen on validation scenes
with the demo model: of 64, 128, 192 and 256 tokens the fewest at which ResPrune keeps 96.5 % (``balanced``), 97.5 %
(``quality``) and 99 % (``document``) of the right answers. ``fast`` is the smallest budget of ResPrune's tables (64 of
576); it kept 96 % there. On the demo model, whose features have 192 directions, the floors decide on every picture
(docs/evaluation.md).
"""

OFF = PruningPolicy(method=NONE)


def _may_randomise(budget: Budget) -> bool:
    return isinstance(budget, EnergyBudget) and budget.solver != "exact"


def _first_problem(detail: ErrorDetails) -> PolicyError:
    """Pydantic's account of a problem, in our words."""
    loc = list(detail["loc"])
    model: type[BaseModel] = PruningPolicy  # the object that holds the field
    if len(loc) > 1:
        # pydantic puts the union's tag after "budget", where the client wrote none
        model = _BUDGETS[str(loc.pop(1))] if loc[0] == "budget" else TextOptions
    path = ".".join(_show_key(part) for part in loc)
    inner = detail.get("ctx", {}).get("error")
    if isinstance(inner, PolicyError):
        return inner.under(path)
    field = model.model_fields[str(loc[-1])]
    if detail["type"] == "missing":
        return PolicyError(path, None, str(field.description), "nothing given where a value is required")
    return PolicyError(path, detail["input"], str(field.description))


def _meant(key: object, known: Iterable[str]) -> str:
    """The known key that an unknown one is most like, as a question; nothing where it is like none."""
    if not isinstance(key, str) or len(key) > _SHOWN_KEY_CHARS:
        return ""
    alike = get_close_matches(key.casefold(), known, n=1)
    return f" (did you mean {alike[0]}?)" if alike else ""


def _show_key(key: object) -> str:
    """``key`` for a path: printable and cut to a bounded length."""
    text = str(key)[:_SHOWN_CHARS]
    return (text if text.isprintable() else json.dumps(text)[1:-1])[:_SHOWN_KEY_CHARS] or '""'


def _show(value: object) -> str:
    """``value`` as the client wrote it, as JSON where it is a scalar, cut to a bounded length."""
    if isinstance(value, str):
        value = value[: _SHOWN_CHARS + 1]
    if value is None or isinstance(value, (bool, str, float)):
        text = json.dumps(value)
    else:
        text = reprlib.repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."

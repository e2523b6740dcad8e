"""Shared by the policies of all methods: strict models with readable errors, budgets, text options."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from typing_extensions import TypeAliasType

MAX_QUERY_CHARS = 4096
MAX_TOKENS = 1_000_000

_SHOWN_CHARS = 200  # most characters of a rejected value in a message
_SHOWN_KEY_CHARS = 64  # most characters of an unknown key in a path


class PolicyError(ValueError):
    """An invalid policy; ``str()`` is one sentence with field, value and accepted values.

    Attributes:
        param: path of the field, such as ``pruning.budget.threshold``.
        value: the rejected value.
        accepted: the accepted values, in words.
        problem: the problem, in words; None: "VALUE is not accepted".
    """

    def __init__(self, param: str, value: object, accepted: str, problem: str | None = None) -> None:
        super().__init__(param, value, accepted, problem)
        self.param = param
        self.value = value
        self.accepted = accepted
        self.problem = problem

    def __str__(self) -> str:
        problem = self.problem or f"{shown(self.value)} is not accepted"
        return f"{self.param}: {problem}; expected {self.accepted}."

    def under(self, param: str) -> PolicyError:
        """The same error with ``param`` prepended to its path."""
        path = ".".join(part for part in (param, self.param) if part)
        return PolicyError(path, self.value, self.accepted, self.problem)


class Strict(BaseModel):
    """A frozen model without type coercion or unknown fields; raises PolicyError."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(value, Mapping | BaseModel):
            raise PolicyError("", value, "an object with any of " + ", ".join(cls.model_fields))
        if isinstance(value, Mapping):
            refuse_unknown(value, cls.model_fields)
        try:
            return handler(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
        inner = problem.get("ctx", {}).get("error")
        name = str(problem["loc"][0]) if problem["loc"] else ""  # the remaining entries are tags of unions
        if isinstance(inner, PolicyError):
            raise inner.under(name)
        if problem["type"] == "missing":
            raise PolicyError(name, None, accepted(cls, name), "nothing given where a value is required")
        choices = [choice for choice in get_args(cls.model_fields[name].annotation) if isinstance(choice, str)]
        raise PolicyError(name, problem["input"], accepted(cls, name), unknown_value(problem["input"], choices))


Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], value: object) -> Model:
    """Validate a model made of `Strict` models; raise the first problem as a PolicyError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem: PolicyError = error.errors(include_url=False)[0]["ctx"]["error"]
    raise problem


Scope: TypeAlias = Literal["image", "request"]


class EnergyBudget(Strict):
    """As many tokens as the image's spectral energy asks for (E-AdaPrune), from min_tokens to max_tokens."""

    scope: ClassVar[Scope] = "image"
    needs_features: ClassVar[bool] = True

    type: Literal["energy"] = "energy"
    threshold: float = Field(default=0.99, gt=0, le=1, description="Share of the spectral energy to keep.")
    min_tokens: int = Field(default=32, ge=1, le=MAX_TOKENS, description="Keep at least this many tokens.")
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="Keep at most this many; null: any.")
    solver: Literal["auto", "exact", "rsvd"] = Field(default="auto", description="auto: exact where that is quick.")
    rank: int = Field(default=300, ge=1, le=65536, description="rsvd: singular values to compute first.")
    power_iterations: int = Field(default=2, ge=0, le=16, description="rsvd: more are slower and more accurate.")

    @model_validator(mode="after")
    def _min_at_most_max(self) -> Self:
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


class _FixedBudget(Strict):
    """A budget for each image, or one for all images of a request, divided by their spectral energy."""

    scope: Scope = Field(
        default="image",
        description="image: keep applies to each image. request: keep applies to all images of the request together, "
        "and their spectral energy divides it.",
    )
    min_tokens: int = Field(
        default=16, ge=1, le=MAX_TOKENS, description="scope request: keep at least this many of each image."
    )

    @property
    def needs_features(self) -> bool:
        """Whether the count depends on the images' features."""
        return self.scope == "request"

    @model_validator(mode="after")
    def _min_only_for_requests(self) -> Self:
        default = type(self).model_fields["min_tokens"].default
        if self.scope == "image" and self.min_tokens != default:
            problem = f'{self.min_tokens} given, but only a budget of scope "request" uses min_tokens'
            raise PolicyError("min_tokens", self.min_tokens, 'scope "request" beside it', problem)
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if self.scope == "image":
            del fields["scope"], fields["min_tokens"]
        return fields


class RatioBudget(_FixedBudget):
    """A fixed share of the image's tokens, rounded half up, at least 1."""

    type: Literal["ratio"] = "ratio"
    keep: float = Field(gt=0, le=1, description="Share of the image's tokens to keep.")


class TokensBudget(_FixedBudget):
    """A fixed number of tokens, or all of them where the image has fewer."""

    type: Literal["tokens"] = "tokens"
    keep: int = Field(ge=1, le=MAX_TOKENS, description="Number of tokens to keep.")


class MethodBudget(Strict):
    """The count that the method finds by itself."""

    scope: ClassVar[Scope] = "image"
    needs_features: ClassVar[bool] = True

    type: Literal["method"] = "method"


Budget: TypeAlias = EnergyBudget | RatioBudget | TokensBudget | MethodBudget

_BUDGETS: dict[str, type[Budget]] = {model.model_fields["type"].default: model for model in get_args(Budget)}


def _with_type(value: object) -> object:
    """Let ``type`` default to ``energy``, and name the type that a misplaced key belongs to."""
    if isinstance(value, BaseModel):
        return value
    if not isinstance(value, Mapping):
        raise PolicyError("", value, "an object whose type is one of " + ", ".join(_BUDGETS))
    kind = value.get("type", "energy")
    if not isinstance(kind, str) or kind not in _BUDGETS:
        raise PolicyError("type", kind, "one of " + ", ".join(_BUDGETS), unknown_value(kind, _BUDGETS))
    for key in value:
        owners = [name for name, model in _BUDGETS.items() if key in model.model_fields]
        if owners and kind not in owners:
            raise PolicyError(
                key,
                value[key],
                "one of " + ", ".join(_BUDGETS[kind].model_fields),
                f"{shown(value[key])} given, but {key} belongs to budget type {' or '.join(owners)}, "
                f"and this budget is of type {kind}",
            )
    return {**value, "type": kind}


AnyBudget = TypeAliasType("AnyBudget", Annotated[Budget, Field(discriminator="type"), BeforeValidator(_with_type)])


class TextOptions(Strict):
    """Where the text that guides the choice comes from, and which of its words count."""

    scope: Literal["message", "last_turn"] = Field(
        default="message", description="The message that carries the image, or the last user message."
    )
    query: str | None = Field(default=None, max_length=MAX_QUERY_CHARS, description="A text to use instead.")
    clean: bool = Field(default=True, description="Use the nouns of the question; false: every word.")
    modifiers: bool = Field(default=True, description="With clean, use the nouns' adjectives and numbers too.")


def refuse_unknown(keys: Mapping[Any, Any], known: Iterable[str], *, param: str = "") -> None:
    """Raise PolicyError for the first unknown key, with the nearest known one; ``param`` is its parent's path."""
    known = list(known)
    for key, value in keys.items():
        if key not in known:
            problem = f"unknown field{did_you_mean(key, known)}"
            path = f"{param}.{_shown_key(key)}" if param else _shown_key(key)
            raise PolicyError(path, value, "one of " + ", ".join(known), problem)


def unknown_value(value: object, known: Iterable[str]) -> str:
    """The problem of a PolicyError for a value that is none of the known ones, with the nearest one."""
    return f"{shown(value)} is not accepted{did_you_mean(value, known)}"


def did_you_mean(written: object, known: Iterable[str]) -> str:
    """The nearest known name, as " (did you mean NAME?)"; empty if none is near."""
    if not isinstance(written, str) or len(written) > _SHOWN_KEY_CHARS:
        return ""
    matches = get_close_matches(written.casefold(), known, 1)
    return f" (did you mean {matches[0]}?)" if matches else ""


@cache
def accepted(model: type[BaseModel], name: str) -> str:
    """The values that a field accepts, in words, from its type and bounds."""
    return _in_words(model.model_json_schema()["properties"][name])


def _in_words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return "null or " + " or ".join(_in_words(kind) for kind in schema["anyOf"] if kind != {"type": "null"})
    if "enum" in schema:
        *others, last = (json.dumps(value) for value in schema["enum"])
        return f"{', '.join(others)} or {last}"
    if schema["type"] == "boolean":
        return "true or false"
    if schema["type"] == "string":
        return f"a string of at most {schema['maxLength']} characters"
    noun = "an integer" if schema["type"] == "integer" else "a number"
    most = schema.get("maximum")
    if isinstance(most, int) and most >= 2**53:
        most = f"2**{most.bit_length()} - 1"
    if "minimum" in schema:
        return f"{noun} from {schema['minimum']}" + (f" to {most}" if most is not None else "")
    bounds = [f"above {schema['exclusiveMinimum']}"] if "exclusiveMinimum" in schema else []
    bounds += [f"at most {most}"] if most is not None else []
    return f"{noun} {' and '.join(bounds)}".strip()


def _shown_key(key: object) -> str:
    """``key`` for a path: printable and cut to a bounded length."""
    text = str(key)[:_SHOWN_CHARS]
    return (text if text.isprintable() else json.dumps(text)[1:-1])[:_SHOWN_KEY_CHARS] or '""'


def shown(value: object) -> str:
    """``value`` for a message: scalars as JSON, cut to a bounded length."""
    if isinstance(value, str):
        value = value[: _SHOWN_CHARS + 1]
    if value is None or isinstance(value, (bool, str, float)):
        text = json.dumps(value)
    else:
        text = reprlib.repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."

"""What a method is: its parameters, what the rest of the package must know of it, and how it selects tokens.

A policy is validated without torch, so the files of this folder take it from :mod:`vllm_vtprune.lazy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field

from vllm_vtprune.features import Layout, VisualFeatures
from vllm_vtprune.lazy import Tensor
from vllm_vtprune.options import AnyBudget, EnergyBudget, Strict
from vllm_vtprune.selectors.merged import Merged

# "grid": a single one. "positions": where each token lies, on a grid or on tiles. "dynamic_resolution": a picture has
# as many tokens as its size asks for, so that it can be scaled before it is encoded.
Input: TypeAlias = Literal[
    "text", "encoder", "cls_attention", "overview_attention", "keys", "grid", "positions", "dynamic_resolution"
]
Cost: TypeAlias = Literal["nothing", "ranking", "pairwise", "greedy"]

COSTS: Mapping[Cost, str] = MappingProxyType(
    {
        "nothing": "chooses no tokens",
        "ranking": "scores each of the N tokens once and sorts them",
        "pairwise": "compares the N tokens with each other: one N x N matrix, or a few smaller ones",
        "greedy": "compares the N tokens with each other and takes one step over all of them for each token kept",
    }
)
"""What a method's time grows with, in words."""


class Needs(dict[str, Input]):
    """Metadata of a parameter: the values of it that need an input, with that input."""


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

    @property
    def attention_or_norm(self) -> Literal["cls", "norm"]:
        """What ``auto`` takes for importance: CLS attention where the encoder has it."""
        return "cls" if "cls_attention" in self.provides else "norm"

    def supports(self, method: type[Method]) -> bool:
        """Whether the family has what a method needs."""
        return method.needs <= self.inputs


def _describe(schema: dict[str, Any], model: type[Any]) -> None:
    schema["description"] = f"{model.idea[0].upper()}{model.idea[1:]}."


class Method(Strict):
    """A policy of one method. A subclass declares facts, as below, its parameters as fields, and ``select``."""

    model_config = ConfigDict(json_schema_extra=_describe)

    idea: ClassVar[str]  # what it keeps, in at most 12 words
    paper: ClassVar[str] = "baseline"  # where it comes from
    arxiv: ClassVar[str | None] = None  # the paper's number there
    cost: ClassVar[Cost] = "greedy"  # what its time grows with; the dearest where a method says nothing
    needs: ClassVar[frozenset[Input]] = frozenset()  # inputs without which it cannot run
    uses: ClassVar[frozenset[Input]] = frozenset()  # inputs it takes when they are there; it must do without a text
    equivariant: ClassVar[bool] = False  # permuting the tokens permutes the picks (under default parameters)
    capped: ClassVar[bool] = False  # it cannot keep every token: `max_keep` says how many
    merges: ClassVar[bool] = False  # the kept tokens take in those that leave, so their embeddings change
    own_count: ClassVar[bool] = False  # it has a `count` of its own (`budget.type` "method")
    draws: ClassVar[bool] = False  # it draws random numbers, from `seed`
    # "cpu": its inputs are copied to the CPU, once; for what goes from pick to pick, which a GPU would have to tell the
    # host. "device": where the features are. Then it must not ask the host for each pick, nor have a matrix in float64.
    runs_on: ClassVar[Literal["cpu", "device"]] = "cpu"
    # It scales the picture before it is encoded: there is no `select`, and budgets that need features are refused.
    preprocesses: ClassVar[bool] = False

    method: str
    budget: AnyBudget = Field(default=EnergyBudget(), description="How many tokens to keep.")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Of random methods, and of the solvers rsvd and auto.")

    @classmethod
    def parameters(cls) -> frozenset[str]:
        """The fields, beside ``method`` and ``budget``, that the method itself reads."""
        return frozenset(cls.model_fields) - {"method", "budget"} - (set() if cls.draws else {"seed"})

    @property
    def used(self) -> frozenset[str]:
        """The fields that the method and the budget's solver read."""
        randomised = isinstance(self.budget, EnergyBudget) and self.budget.solver != "exact"
        return self.parameters() | {"method", "budget"} | ({"seed"} if randomised else set())

    def defaults(self, family: FamilyDefaults) -> dict[str, object]:
        """What stands for ``null`` or ``auto``, by parameter."""
        return {}

    def idle(self) -> frozenset[str]:
        """The parameters that cannot change the picks, given the others, and the inputs that are not looked at then."""
        return frozenset()

    @classmethod
    def max_keep(cls, features: VisualFeatures | Layout) -> int:
        """The most tokens that the method can keep."""
        return features.num_tokens

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor | Merged:
        """The ``(k,)`` int64 positions to keep, first pick first, or for a method that merges, a `Merged`.

        Args:
            features: of one image, checked.
            k: tokens to keep, from 1 to ``max_keep``.
            text_embeds: ``(M, d)`` rows of the language model's embedding table for the text's words; None without any.
        """
        raise NotImplementedError

    def count(self, features: VisualFeatures, text_embeds: Tensor | None) -> int:
        """How many tokens the method would keep; only for methods that declare ``own_count``."""
        raise NotImplementedError

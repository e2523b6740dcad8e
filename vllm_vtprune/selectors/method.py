"""The base class of methods: parameters, facts about the method, and the selection.

Policies are validated without torch, so the files of this folder import it from :mod:`vllm_vtprune.lazy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field

from vllm_vtprune.features import Counted, VisualFeatures
from vllm_vtprune.lazy import Tensor
from vllm_vtprune.options import AnyBudget, EnergyBudget, Strict
from vllm_vtprune.selectors.merged import Merged

# "grid": one grid of all tokens. "positions": each token's position, on a grid or on tiles. "dynamic_resolution": the
# token count follows the image's size, so that it can be resized before encoding.
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
"""How a method's time scales, in words."""


LOSSLESS = ("crop_borders", "dedup")
"""Fields of every method that drop tokens before the budget applies."""


class Needs(dict[str, Input]):
    """Metadata of a parameter: its values that need an input -> that input."""


@dataclass(frozen=True)
class FamilyDefaults:
    """A model family's values for ``null`` and ``auto``, and its inputs.

    Attributes:
        clip_alpha: strength of the text under the gate ``clip`` (the paper's alpha); ``minmax`` has its own.
        provides: the family's inputs besides text, ``encoder`` and ``embeds``.
        drops_duplicates: whether dropping a token moves no other one (M-RoPE), so that exact duplicates can go.
    """

    clip_alpha: float
    provides: frozenset[Input]
    drops_duplicates: bool = False

    @property
    def inputs(self) -> frozenset[Input]:
        """All inputs that the family provides."""
        return self.provides | {"text", "encoder"}

    @property
    def attention_or_norm(self) -> Literal["cls", "norm"]:
        """``auto`` for importance and seed token: CLS attention if the encoder has it, else the norm."""
        return "cls" if "cls_attention" in self.provides else "norm"

    def supports(self, method: type[Method]) -> bool:
        """Whether the family provides the inputs that a method needs."""
        return method.needs <= self.inputs


def _describe(schema: dict[str, Any], model: type[Any]) -> None:
    schema["description"] = f"{model.idea[0].upper()}{model.idea[1:]}."


class Method(Strict):
    """A policy with one method. A subclass declares the facts below, its parameters as fields, and ``select``."""

    model_config = ConfigDict(json_schema_extra=_describe)

    idea: ClassVar[str]  # which tokens it keeps, in at most 12 words
    paper: ClassVar[str] = "baseline"  # title
    arxiv: ClassVar[str | None] = None  # arXiv number
    cost: ClassVar[Cost] = "greedy"  # how its time scales
    needs: ClassVar[frozenset[Input]] = frozenset()  # required inputs
    uses: ClassVar[frozenset[Input]] = frozenset()  # optional inputs; text is always optional
    equivariant: ClassVar[bool] = False  # permuting the tokens permutes the selection (with default parameters)
    capped: ClassVar[bool] = False  # it cannot keep every token: `max_keep` is the limit
    merges: ClassVar[bool] = False  # dropped tokens are merged into kept ones
    own_count: ClassVar[bool] = False  # it has a `count` (`budget.type` "method")
    draws: ClassVar[bool] = False  # it draws random numbers from `seed`
    # "cpu": inputs are copied to the CPU once; for methods that synchronise with the host at each step.
    # "device": runs where the features are; must not synchronise at each step or hold a float64 matrix.
    runs_on: ClassVar[Literal["cpu", "device"]] = "cpu"
    # It resizes the image before encoding: there is no `select`, and budgets that need features are rejected.
    preprocesses: ClassVar[bool] = False

    method: str
    budget: AnyBudget = Field(default=EnergyBudget(), description="How many tokens to keep.")
    crop_borders: bool = Field(
        default=False, description="Crop solid borders of the image before encoding, if the model takes any size."
    )
    dedup: bool = Field(
        default=False,
        description="Drop tokens with the same pixels as an earlier one before the budget applies, if the model has "
        "M-RoPE.",
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Of random methods, and of the solvers rsvd and auto.")

    @classmethod
    def parameters(cls) -> frozenset[str]:
        """The fields that the method reads, besides ``method`` and ``budget``."""
        shared = {"method", "budget", *LOSSLESS}
        return frozenset(cls.model_fields) - shared - (set() if cls.draws else {"seed"})

    @property
    def used(self) -> frozenset[str]:
        """The fields that the method and the budget's solver read."""
        randomised = isinstance(self.budget, EnergyBudget) and self.budget.solver != "exact"
        lossless = {name for name in LOSSLESS if getattr(self, name)}
        return self.parameters() | {"method", "budget"} | ({"seed"} if randomised else set()) | lossless

    def defaults(self, family: FamilyDefaults) -> dict[str, object]:
        """The values of ``null`` and ``auto``, by parameter."""
        return {}

    def idle(self) -> frozenset[str]:
        """Parameters and inputs that cannot change the selection, given the other parameters."""
        return frozenset()

    @classmethod
    def max_keep(cls, features: Counted) -> int:
        """The most tokens that the method can keep."""
        return features.num_tokens

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor | Merged:
        """The ``(k,)`` int64 indices to keep, in order of selection; a `Merged` from a method that merges.

        Args:
            features: the N visual tokens of one image, validated.
            k: tokens to keep, from 1 to ``max_keep``.
            text_embeds: ``(M, d)`` rows of the language model's embedding table for the text's words; None: no text.
        """
        raise NotImplementedError

    def count(self, features: VisualFeatures, text_embeds: Tensor | None) -> int:
        """Tokens that the method itself would keep; only with ``own_count``."""
        raise NotImplementedError

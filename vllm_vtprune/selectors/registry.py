"""The table of selection methods.

It imports neither torch nor a method's module, so that a policy is validated without them.

To add a method: write ``selectors/<name>.py`` with a function

    select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor

that returns the ``(k,)`` int64 positions it keeps, first pick first (or, if it merges tokens, a
:class:`~vllm_vtprune.selectors.merged.Merged`), add a row below, to the table in ``docs/methods.md`` and to the matrix
in ``tests/core/test_selector_matrix.py``. The caller (:func:`vllm_vtprune.plan.plan_tokens`) has already resolved the
policy, checked the features and brought ``k`` into ``1..max_keep``; it sorts and gathers.

A method that ``preprocesses`` has no ``select``: the multimodal processor of a family that provides what it needs
scales the picture before it is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_vtprune.features import VisualFeatures
    from vllm_vtprune.policy import PruningPolicy
    from vllm_vtprune.selectors.merged import Merged

# "grid": a single one. "positions": where each token lies, on a grid or on tiles. "dynamic_resolution": a picture has
# as many tokens as its size asks for, so that it can be scaled before it is encoded.
Input: TypeAlias = Literal[
    "text", "encoder", "cls_attention", "overview_attention", "keys", "grid", "positions", "dynamic_resolution"
]
Select: TypeAlias = "Callable[[VisualFeatures, int, PruningPolicy, Tensor | None], Tensor | Merged]"
OwnCount: TypeAlias = "Callable[[VisualFeatures, PruningPolicy, Tensor | None], int]"
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

_NOTHING: frozenset[str] = frozenset()


def _nothing_idle(policy: PruningPolicy) -> frozenset[str]:
    return _NOTHING


@dataclass(frozen=True)
class MethodSpec:
    """What the rest of the package knows about a method.

    Attributes:
        name: the value of ``method`` in a policy.
        idea: what it keeps, in a few words.
        paper: where it comes from.
        module: module with the function ``select`` (and ``own_count`` if the method has its own count).
        cost: what its time grows with, a key of :data:`COSTS`; the dearest where a method says nothing.
        needs: inputs without which the method cannot run.
        uses: inputs it takes when they are there; without a text, every method that reads one has another form.
        parameters: fields of the policy, beside ``method`` and ``budget``, that the method reads.
        defaults: the method's own values for parameters that are ``null`` in a policy.
        equivariant: permuting the tokens permutes the picks and changes nothing else (under default parameters).
        max_keep: the most tokens the method can return for given features; None for all of them.
        merges: the kept tokens take in those that leave, so their embeddings change.
        own_count: the method can find its own count (``budget.type`` ``"method"``).
        runs_on: ``cpu``: its inputs are copied to the CPU, once, wherever the features are; for what goes from pick to
            pick, which a GPU would have to tell the host. ``device``: where the features are. Then it must not ask the
            host for each pick, and have no matrix in float64.
        preprocesses: the method scales the picture before it is encoded, and chooses none of its tokens: there is no
            ``select``, and budgets that need features are refused.
        idle: the parameters that cannot change the picks, given the others; ``"text"`` or ``"encoder"`` among them
            means that the policy does not look at that input.
    """

    name: str
    idea: str
    paper: str
    module: str
    cost: Cost = "greedy"
    needs: frozenset[Input] = frozenset()
    uses: frozenset[Input] = frozenset()
    parameters: frozenset[str] = frozenset()
    defaults: Mapping[str, float] = field(default_factory=dict)
    equivariant: bool = False
    max_keep: Callable[[VisualFeatures], int] | None = None
    merges: bool = False
    own_count: bool = False
    runs_on: Literal["cpu", "device"] = "cpu"
    preprocesses: bool = False
    idle: Callable[[PruningPolicy], frozenset[str]] = _nothing_idle

    @property
    def reads(self) -> frozenset[Input]:
        """The inputs, beside ``embeds``, that can change what the method returns under some policy."""
        return self.needs | self.uses

    @property
    def reads_text(self) -> bool:
        return "text" in self.reads

    def load(self) -> Select:
        """The selection function, unless the method ``preprocesses``; imports its module (and torch) on first use."""
        return cast("Select", import_module(self.module).select)

    def load_own_count(self) -> OwnCount:
        """The function that finds the method's own count; only for methods that declare ``own_count``."""
        return cast("OwnCount", import_module(self.module).own_count)


def _features_idle(policy: PruningPolicy) -> frozenset[str]:
    return frozenset({"features", "encoder"}) if policy.features == "projected" else _NOTHING


def _resprune_idle(policy: PruningPolicy) -> frozenset[str]:
    idle = _features_idle(policy)
    # `rank_by: relevance` ranks by residual without a text, so every parameter can matter
    if policy.rank_by != "relevance" and policy.alpha == 0 and policy.seed_token != "relevance":
        idle |= {"text", "relevance", "gate"}
    return idle


def _importance_idle(policy: PruningPolicy) -> frozenset[str]:
    return _NOTHING if policy.importance == "relevance" else frozenset({"text", "relevance"})


def _adaptprune_idle(policy: PruningPolicy) -> frozenset[str]:
    idle = set(_importance_idle(policy))
    if not policy.distance:
        idle |= {"sigma_d", "radius"}
    if not policy.similarity:
        idle.add("sigma_s")
    return frozenset(idle)


def _cells_3x3(features: VisualFeatures) -> int:
    return sum(-(-rows // 3) * -(-columns // 3) for rows, columns in features.grids)


# What the methods share that start from a map of importance.
_IMPORTANCE = frozenset({"importance", "text", "relevance"})
_IMPORTANCE_INPUTS: frozenset[Input] = frozenset({"text", "cls_attention"})


METHODS: Mapping[str, MethodSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            MethodSpec(
                name="resprune",
                idea="the token that those chosen explain least, weighted by its likeness to the question's nouns",
                paper="ResPrune: Text-Conditioned Subspace Reconstruction for Visual Token Pruning",
                module="vllm_vtprune.selectors.resprune",
                cost="greedy",
                uses=frozenset({"text", "encoder", "cls_attention", "grid"}),
                parameters=frozenset({"text", "gate", "alpha", "relevance", "seed_token", "rank_by", "features"}),
                equivariant=True,
                runs_on="device",
                idle=_resprune_idle,
            ),
            MethodSpec(
                name="adaptprune",
                idea="the most important token, after those near and like the ones chosen have lost importance",
                paper="Multi-Cue Adaptive Visual Token Pruning for Large Vision-Language Models",
                module="vllm_vtprune.selectors.adaptprune",
                cost="greedy",
                needs=frozenset({"positions"}),
                uses=_IMPORTANCE_INPUTS,
                parameters=_IMPORTANCE | {"sigma_d", "sigma_s", "radius", "correction", "distance", "similarity"},
                defaults={"sigma_d": 1.5, "sigma_s": 0.05, "radius": 5.0},
                idle=_adaptprune_idle,
            ),
            MethodSpec(
                name="divprune",
                idea="the token farthest from those chosen",
                paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
                module="vllm_vtprune.selectors.divprune",
                cost="greedy",
                uses=frozenset({"encoder"}),
                parameters=frozenset({"features"}),
                equivariant=True,
                idle=_features_idle,
            ),
            MethodSpec(
                name="cdpruner",
                idea="the most diverse tokens, given the question (a determinantal point process)",
                paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
                module="vllm_vtprune.selectors.cdpruner",
                cost="greedy",
                uses=frozenset({"text"}),
                parameters=frozenset({"text"}),
                equivariant=True,
                runs_on="device",
            ),
            MethodSpec(
                name="scope",
                idea="the token that covers most of what is not yet covered, weighted by CLS attention",
                paper="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs",
                module="vllm_vtprune.selectors.scope",
                cost="greedy",
                needs=frozenset({"encoder", "cls_attention"}),
                equivariant=True,
            ),
            MethodSpec(
                name="cover",
                idea="the token that covers most of what sets the tokens apart, weighted by importance",
                paper="CoverPruner (arXiv 2609.03158)",
                module="vllm_vtprune.selectors.cover",
                cost="greedy",
                uses=_IMPORTANCE_INPUTS,
                parameters=_IMPORTANCE,
                equivariant=True,
                idle=_importance_idle,
            ),
            MethodSpec(
                name="leverage",
                idea="the tokens that hold most of a direction, less what is like a better one",
                paper="SFPruner: Structured Redundancy Modeling for Efficient Visual Token Pruning in High-Resolution "
                "MLLMs",
                module="vllm_vtprune.selectors.leverage",
                cost="pairwise",
                equivariant=True,
            ),
            MethodSpec(
                name="dart",
                idea="a few tokens of large norm, and those least like each of them",
                paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
                module="vllm_vtprune.selectors.dart",
                cost="ranking",
                equivariant=True,
            ),
            MethodSpec(
                name="fastervlm",
                idea="the tokens with the most CLS attention",
                paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: "
                "Make VLM Inference Faster",
                module="vllm_vtprune.selectors.fastervlm",
                cost="ranking",
                needs=frozenset({"cls_attention"}),
                equivariant=True,
            ),
            MethodSpec(
                name="vispruner",
                idea="half by CLS attention, half by removing duplicates from the rest",
                paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
                module="vllm_vtprune.selectors.vispruner",
                cost="pairwise",
                needs=frozenset({"encoder", "cls_attention"}),
                equivariant=True,
            ),
            MethodSpec(
                name="hired",
                idea="a budget for each tile by what the overview attends to, and CLS attention within each",
                paper="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution "
                "Vision-Language Models",
                module="vllm_vtprune.selectors.hired",
                cost="ranking",
                needs=frozenset({"cls_attention"}),
                uses=frozenset({"overview_attention"}),
                equivariant=True,
            ),
            MethodSpec(
                name="visionzip",
                idea="the tokens with the most CLS attention, and a few that take in all others",
                paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
                module="vllm_vtprune.selectors.visionzip",
                cost="pairwise",
                needs=frozenset({"cls_attention", "keys"}),
                merges=True,
            ),
            MethodSpec(
                name="prumerge",
                idea="the outliers of CLS attention, which take in tokens like them, and one for all others",
                paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
                module="vllm_vtprune.selectors.prumerge",
                cost="pairwise",
                needs=frozenset({"cls_attention", "keys"}),
                equivariant=True,
                merges=True,
                own_count=True,
            ),
            MethodSpec(
                name="trim",
                idea="the tokens most like the question's nouns, and the mean of all others",
                paper="Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs",
                module="vllm_vtprune.selectors.trim",
                cost="ranking",
                uses=frozenset({"text"}),
                parameters=frozenset({"text"}),
                equivariant=True,
                merges=True,
                own_count=True,
            ),
            MethodSpec(
                name="tome",
                idea="the most similar pairs merged, round after round",
                paper="Token Merging: Your ViT But Faster",
                module="vllm_vtprune.selectors.tome",
                cost="pairwise",
                needs=frozenset({"keys"}),
                merges=True,
            ),
            MethodSpec(
                name="pool",
                idea="the means of equal cells of the grid",
                paper="baseline",
                module="vllm_vtprune.selectors.pool",
                cost="ranking",
                uses=frozenset({"positions"}),
                merges=True,
            ),
            MethodSpec(
                name="resize",
                idea="the picture scaled down before it is encoded",
                paper="baseline (VTC-Bench)",
                module="vllm_vtprune.resize",
                cost="nothing",
                needs=frozenset({"dynamic_resolution"}),
                preprocesses=True,
            ),
            MethodSpec(
                name="random",
                idea="any tokens",
                paper="baseline",
                module="vllm_vtprune.selectors.random_",
                cost="ranking",
                parameters=frozenset({"seed"}),
            ),
            MethodSpec(
                name="uniform",
                idea="tokens evenly spaced over the grid",
                paper="baseline",
                module="vllm_vtprune.selectors.uniform",
                cost="ranking",
                uses=frozenset({"grid"}),
            ),
            MethodSpec(
                name="random3x3",
                idea="one random token of each 3 x 3 cell, then by importance",
                paper="baseline (AdaptPrune, Table 5 d)",
                module="vllm_vtprune.selectors.random3x3",
                cost="ranking",
                needs=frozenset({"positions"}),
                uses=_IMPORTANCE_INPUTS,
                parameters=_IMPORTANCE | {"seed"},
                max_keep=_cells_3x3,
                idle=_importance_idle,
            ),
            MethodSpec(
                name="maxpool3x3",
                idea="the most important token of each 3 x 3 cell, then by importance",
                paper="baseline (AdaptPrune, Table 5 e)",
                module="vllm_vtprune.selectors.maxpool3x3",
                cost="ranking",
                needs=frozenset({"positions"}),
                uses=_IMPORTANCE_INPUTS,
                parameters=_IMPORTANCE,
                max_keep=_cells_3x3,
                idle=_importance_idle,
            ),
            MethodSpec(
                name="avgpool",
                idea="the tokens whose surroundings are most important",
                paper="baseline (AdaptPrune, Table 5 f)",
                module="vllm_vtprune.selectors.avgpool",
                cost="ranking",
                needs=frozenset({"positions"}),
                uses=_IMPORTANCE_INPUTS,
                parameters=_IMPORTANCE,
                idle=_importance_idle,
            ),
            MethodSpec(
                name="skip",
                idea="every other of the most important tokens",
                paper="baseline (AdaptPrune, Table 5 b)",
                module="vllm_vtprune.selectors.skip",
                cost="ranking",
                uses=_IMPORTANCE_INPUTS,
                parameters=_IMPORTANCE,
                equivariant=True,
                max_keep=lambda features: (features.num_tokens + 1) // 2,
                idle=_importance_idle,
            ),
            MethodSpec(
                name="last",
                idea="the last tokens",
                paper="baseline (AdaptPrune, Table 5 g)",
                module="vllm_vtprune.selectors.last",
                cost="ranking",
            ),
        )
    }
)

SELECTORS: Mapping[str, MethodSpec] = MappingProxyType(
    {name: spec for name, spec in METHODS.items() if not spec.preprocesses}
)
"""The methods that choose among the tokens of an encoded picture."""

"""The plan for one image: how many visual tokens to keep, and which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from vllm_vtprune.budget import token_budget
from vllm_vtprune.features import VisualFeatures, require_finite
from vllm_vtprune.policy import LLAVA, FamilyDefaults, MethodBudget, PolicyError, PruningPolicy
from vllm_vtprune.precision import full_float32
from vllm_vtprune.selectors.merged import Merged
from vllm_vtprune.selectors.method import Input
from vllm_vtprune.selectors.registry import SELECTORS


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Which of an image's ``N`` visual tokens are kept.

    Attributes:
        kept: ``(k,)`` int64 indices, ascending.
        order: ``(k,)`` int64 the same indices in order of selection.
        budget: ``k``.
        energy: share of the encoder features' spectral energy at ``k``; None if not measured.
        embeds: ``(k, d)`` embeddings to prefill, one per ``kept``: rows of the input embeddings, or merged tokens.
        timings: seconds by stage: ``budget`` and ``select``.
    """

    kept: Tensor
    order: Tensor
    budget: int
    energy: float | None
    embeds: Tensor
    timings: dict[str, float]


@torch.no_grad()
@full_float32()
def plan_tokens(
    features: VisualFeatures,
    policy: object,
    text_embeds: Tensor | None = None,
    *,
    family: FamilyDefaults = LLAVA,
) -> PruningPlan:
    """Decide which visual tokens of one image to keep.

    Args:
        features: the image's tokens, in any floating-point type; computed in float32 and float64.
        policy: a policy, its fields, or a preset's name; ``null`` and ``auto`` resolve to defaults of ``family``
            and the available ``features``.
        text_embeds: ``(M, d)`` rows of the language model's input embedding table for the text's nouns. None or
            ``M = 0`` for the text-agnostic form.
        family: defaults of the model family.

    Raises:
        PolicyError: the policy is invalid, the features lack what it needs, or the method selects no tokens (`resize`).
        ValueError: features or text are not finite, or their shapes do not match.
    """
    policy = PruningPolicy.parse(policy, param="policy")
    if not policy.enabled:
        all_tokens = torch.arange(features.num_tokens, device=features.embeds.device)
        return PruningPlan(
            all_tokens, all_tokens, features.num_tokens, None, features.embeds, {"budget": 0.0, "select": 0.0}
        )
    if not policy.selects:
        problem = f"method {policy.method} resizes the image before encoding and selects no tokens"
        raise PolicyError("pruning.method", policy.method, "one of " + ", ".join(SELECTORS), problem)
    distinct = features.distinct if policy.chosen.dedup else None
    if distinct is not None:
        features = features.without_duplicates()
    policy = policy.resolve(replace(family, provides=_provided(features), drops_duplicates=False))
    method = policy.chosen
    require_finite("embeds", features.embeds)
    for name in ("encoder", "cls_attention", "overview_attention", "keys"):
        if name in policy.reads and (values := getattr(features, name)) is not None:
            require_finite(name, values)
    inputs = features if method.runs_on == "device" else _on_cpu(features, policy.reads)
    if text_embeds is not None:
        text_embeds = _checked_text(text_embeds, inputs) if policy.conditions_on_text else None

    started = perf_counter()
    most = method.max_keep(features)
    energy: float | None = None
    if isinstance(policy.budget, MethodBudget):
        k = method.count(inputs, text_embeds)
    else:
        k, energy = token_budget(policy.budget, features, seed=method.seed, most=most)
    k = min(k, most)
    budgeted = perf_counter()
    n = features.num_tokens
    keeps_distinct = distinct is not None and k == n  # asked for nothing but dedup, of up to 10,000s of tokens
    selection = torch.arange(n) if keeps_distinct else method.select(inputs, k, text_embeds)
    order = (selection.order if isinstance(selection, Merged) else selection).to(features.embeds.device)
    kept, ranks = order.sort()
    if isinstance(selection, Merged) and k < n:
        embeds = selection.embeds.to(order.device)[ranks]
    else:
        embeds = features.embeds[kept]  # if every token is kept, nothing is merged
    if embeds.is_cuda:
        torch.cuda.synchronize(embeds.device)  # so that the timing includes the GPU's work
    timings = {"budget": budgeted - started, "select": perf_counter() - budgeted}
    if distinct is not None:
        indices = torch.tensor(distinct, device=kept.device)
        kept, order = indices[kept], indices[order]
    return PruningPlan(kept, order, k, energy, embeds, timings)


def _on_cpu(features: VisualFeatures, reads: frozenset[Input]) -> VisualFeatures:
    """Copy features to the CPU; GPU features without unread inputs."""
    if features.embeds.device.type == "cpu":
        return features
    names: set[Input] = {"cls_attention", "overview_attention", "keys"}
    unread: dict[str, Any] = dict.fromkeys(names - reads)
    encoder = features.encoder if "encoder" in reads else features.embeds
    return replace(features, encoder=encoder, **unread).to("cpu")


def _provided(features: VisualFeatures) -> frozenset[Input]:
    optional: tuple[Input, ...] = ("cls_attention", "overview_attention", "keys", "grid")
    provided = {name for name in optional if getattr(features, name) is not None}
    return frozenset(provided | {"positions"} if features.grids else provided)


def _checked_text(text_embeds: Tensor, features: VisualFeatures) -> Tensor | None:
    width = features.embeds.shape[1]
    if text_embeds.ndim != 2 or text_embeds.shape[1] != width:
        raise ValueError(f"text_embeds must have shape (M, {width}) like embeds, got {tuple(text_embeds.shape)}")
    if len(text_embeds) == 0:
        return None
    require_finite("text_embeds", text_embeds)
    return text_embeds.to(features.embeds.device)

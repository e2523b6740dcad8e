"""One number for each token, for the methods that start from a map of importance.

AdaptPrune and FastV read it from the attention of the language model, which is not there before prefill. The policy's
``importance`` says what stands in for it.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.gate import minmax
from vllm_vtprune.selectors.resprune import text_relevance
from vllm_vtprune.selectors.similarity import CHUNK, TINY, squared_lengths, unit_rows


def importance_map(features: VisualFeatures, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """``(N,)`` in float64, never negative, the caller's to change.

    ``cls``: attention of the encoder's CLS token. ``relevance``: likeness to the text ``(M, d)`` in the form of
    ``policy.relevance``, scaled as by ResPrune's gate ``minmax``; without a text, ``cls`` where there is one, else
    ``norm``. ``norm``: length of the token.
    ``residual``: energy of the token that the image's mean token does not explain.
    """
    kind = policy.importance
    if kind == "relevance" and text_embeds is not None:
        unit = unit_rows(features.embeds)
        relevance = text_relevance(unit, text_embeds.to(unit.dtype), policy.relevance)
        return minmax(relevance.double()).float().double()  # of few digits: sums of them are exact
    if kind in ("cls", "relevance") and features.cls_attention is not None:
        return features.cls_attention.to(torch.float64, copy=True)
    if kind == "residual":
        return unlike_the_mean(features.embeds)
    return squared_lengths(features.embeds).sqrt()


def unlike_the_mean(rows: Tensor) -> Tensor:
    """``(N,)`` energy, in float64, of each of the ``rows (N, d)`` outside the direction of their mean.

    Computed from their differences from the mean: where rows are alike, their own lengths would cancel.
    """
    mean = rows.sum(dim=0, dtype=torch.float64) / len(rows)
    direction = mean / torch.linalg.vector_norm(mean).clamp(min=TINY)
    energies = []
    for chunk in torch.split(rows, CHUNK):
        apart = chunk.double() - mean
        energies.append(apart.square().sum(dim=1) - (apart * direction).sum(dim=1).square())
    return torch.cat(energies).clamp(min=0)

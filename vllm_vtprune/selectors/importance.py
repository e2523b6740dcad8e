"""One number for each token, for the methods that start from a map of importance.

AdaptPrune and FastV read it from the attention of the language model, which is not there before prefill. The policy's
``importance`` says what stands in for it.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.resprune import LEAST_RELEVANCE, text_relevance
from vllm_vtprune.selectors.similarity import squared_lengths, unit_rows


def importance_map(features: VisualFeatures, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """``(N,)`` in float64, never negative, the caller's to change.

    ``cls``: attention of the encoder's CLS token. ``relevance``: likeness to the text ``(M, d)`` in the form of
    ``policy.relevance``; without a text, ``cls`` where there is one and else ``norm``. ``norm``: length of the token.
    ``residual``: energy of the token that the image's mean token does not explain.
    """
    kind = policy.importance
    if kind == "relevance" and text_embeds is not None:
        unit = unit_rows(features.embeds)
        relevance = text_relevance(unit, text_embeds.to(unit.dtype), policy.relevance)
        return relevance.double().clamp(LEAST_RELEVANCE, 1.0)
    if kind in ("cls", "relevance") and features.cls_attention is not None:
        return features.cls_attention.to(torch.float64, copy=True)
    energies = squared_lengths(features.embeds)
    if kind == "residual":
        unit = unit_rows(features.embeds)
        explained = (unit @ unit_rows(features.embeds.float().mean(dim=0, keepdim=True))[0]).double().square()
        return energies * (1 - explained).clamp(min=0)
    return energies.sqrt()

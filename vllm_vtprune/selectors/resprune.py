"""ResPrune: keep the tokens whose span best rebuilds all of them, guided by the question.

"ResPrune: Text-Conditioned Subspace Reconstruction for Visual Token Pruning in Large Vision-Language Models",
Eq. 10-16. From a seed on, each step adds the token with the most energy outside the span of those chosen, times a gate
of its relevance to the text. The paper keeps an orthonormal basis, O(N d) a step. Here the same recurrence runs on the
Gram matrix ``V V^T``: a pivoted Cholesky factorisation with a weighted pivot, O(N k) a step, with the same picks.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.gate import gate
from vllm_vtprune.selectors.pivots import weighted_pivots
from vllm_vtprune.selectors.similarity import compared_rows, squared_lengths

TINY = torch.finfo(torch.float32).tiny


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in order of selection.

    Args:
        features: ``embeds (N, d)``; ``encoder (N, d_v)`` for ``policy.features`` that name it; ``cls_attention`` and
            ``grid`` for the seed tokens that look at them.
        k: tokens to keep, ``1..N``.
        policy: ``gate``, ``alpha``, ``relevance``, ``seed_token``, ``rank_by`` and ``features``, resolved. Residual
            energy, and the seed tokens ``norm`` and ``mean``, are of the rows that ``features`` names; relevance is of
            ``embeds``, the only ones in the space of the text.
        text_embeds: ``(M, d)`` rows for the text's nouns. Without them every gate is 1, ``rank_by`` is ``residual``,
            and the seed token ``relevance`` is ``norm``.

    Once the chosen tokens span all others, the rest follows by gate, then by index. All ties go to the smallest index.
    """
    tokens, energy = _in_range(features.embeds.float())
    relevance = None
    if text_embeds is not None:
        relevance = text_relevance(tokens, text_embeds.float(), policy.relevance)
        relevance /= energy.sqrt().clamp(min=TINY).to(relevance.dtype)
    if relevance is not None and policy.rank_by == "relevance":
        return relevance.sort(descending=True, stable=True).indices[:k]
    if policy.features != "projected":
        del tokens  # before as much again is allocated
        tokens, energy = _in_range(compared_rows(features, policy))
    weight = torch.ones_like(energy) if relevance is None else gate(relevance, policy.gate, policy.alpha or 0.0)
    return weighted_pivots(tokens, energy, weight, _seed_token(features, policy, tokens, energy, relevance), k)


def _in_range(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens whose products stay in the range of float32, scaled alike where they would not, and squared lengths."""
    energy = squared_lengths(tokens)
    if not 1e-18 < energy.max() < 1e18:
        tokens = tokens / energy.max().sqrt().clamp(min=TINY).float()
        energy = squared_lengths(tokens)
    return tokens, energy


def text_relevance(tokens: Tensor, text: Tensor, form: str) -> Tensor:
    """Cosine of each of the ``tokens (N, d)``, of length 1, with the text ``(M, d)``, ``(N,)``.

    The best row's (Eq. 13), the mean over rows, or the one with the mean row. It grows with the length of a token.
    """
    if form == "mean_token":
        text = text.mean(dim=0, keepdim=True)
    text = torch.ldexp(text, -torch.frexp(text.abs().amax()).exponent)  # squares stay in the range of float32
    cosines = tokens @ normalize(text, dim=1, eps=TINY).T
    return cosines.mean(dim=1) if form == "mean" else cosines.amax(dim=1)


def _seed_token(
    features: VisualFeatures, policy: PruningPolicy, tokens: Tensor, energy: Tensor, relevance: Tensor | None
) -> int:
    seed_token = policy.seed_token
    if seed_token == "cls" and features.cls_attention is not None:
        return int(features.cls_attention.argmax())
    if seed_token == "relevance" and relevance is not None:
        return int(relevance.argmax())
    if seed_token == "mean":
        return int(cosine_similarity(tokens, tokens.mean(dim=0, keepdim=True), eps=TINY).argmax())
    if seed_token == "center" and features.grid is not None:
        rows, columns = features.grid
        return (rows - 1) // 2 * columns + (columns - 1) // 2
    return int(energy.argmax())

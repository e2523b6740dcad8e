"""Leverage: ridge leverage scores, discounted by similarity to a higher-scoring token.

SFPruner's scores, computed in one pass. A ridge leverage score is low for a token whose directions are shared by many
others; the discount suppresses tokens similar to a higher-scoring one. No code is public, so the rule follows a summary
of the paper: the ridge (:data:`RIDGE`) and the form of the discount are ours, and the paper's weights by relevance and
saliency are omitted.
"""

from sys import float_info
from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.similarity import squared_lengths, unit_rows

RIDGE = 1.0  # ridge, as a multiple of the mean eigenvalue of V V^T, the tokens' mean squared length
DECIMALS = 10  # to which scores and cosines are rounded; equal tokens differ by less
TINY = float_info.min
BLOCK = 64  # rows per product
STRETCH = 1024  # columns converted to float64 at once
NEAREST = 2  # cosines per token that are recomputed in float64


class Leverage(Method):
    method: Literal["leverage"] = "leverage"
    idea = "highest ridge leverage scores, discounted by similarity to a higher-scoring token"
    paper = "SFPruner: Structured Redundancy Modeling for Efficient Visual Token Pruning in High-Resolution MLLMs"
    arxiv = "2607.23046"
    cost = "pairwise"
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``, highest score first; ties go to the smallest index.

        With ``V = embeds (N, d)``, the score is ``v_i^T (V^T V + ridge I)^-1 v_i`` times ``1 - c``: ``c`` is the
        largest positive cosine with a token of higher leverage (or equal leverage and smaller index). Independent of
        ``k``.
        """
        energy = squared_lengths(features.embeds)
        scores = ridge_leverage(features.embeds, float(energy.mean().clamp(min=TINY)) * RIDGE)
        ranking = scores.sort(descending=True, stable=True).indices
        similarity = torch.empty_like(scores)
        similarity[ranking] = similarity_to_earlier(features.embeds[ranking])
        return (scores * (1 - similarity).round(decimals=DECIMALS)).sort(descending=True, stable=True).indices[:k]


def ridge_leverage(tokens: Tensor, ridge: float) -> Tensor:
    """``(N,)`` ridge leverage scores of ``tokens (N, d)`` in [0, 1], float64.

    Uses the smaller Gram matrix: the diagonal of ``(V V^T + ridge I)^-1`` is ``(1 - score) / ridge``.
    """
    wide = tokens.shape[0] <= tokens.shape[1]
    gram = lower_gram(tokens if wide else tokens.T)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    if wide:
        scores = 1 - ridge * torch.cholesky_inverse(factor).diagonal()
    else:
        chunks = (chunk.double().T for chunk in torch.split(tokens, STRETCH))
        solved = (torch.linalg.solve_triangular(factor, chunk, upper=False) for chunk in chunks)
        scores = torch.cat([columns.square().sum(dim=0) for columns in solved])
    return scores.round(decimals=DECIMALS)


def lower_gram(rows: Tensor) -> Tensor:
    """``(m, m)`` lower triangle of the Gram matrix of ``rows (m, l)``, float64."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for stretch in torch.split(rows, STRETCH, dim=1):
        exact = stretch.double()
        for first in range(0, len(rows), BLOCK):
            last = min(first + BLOCK, len(rows))
            gram[first:last, :last].addmm_(exact[first:last], exact[:last].T)
    return gram


def similarity_to_earlier(tokens: Tensor) -> Tensor:
    """``(N,)`` largest positive cosine of each of ``tokens (N, d)`` with an earlier one, else 0; float64.

    Candidates are found in float32.
    """
    unit = unit_rows(tokens)
    lengths = squared_lengths(tokens).sqrt().clamp(min=TINY)
    largest = [torch.zeros(1, dtype=torch.float64)]
    for first in range(1, len(tokens), BLOCK):
        last = min(first + BLOCK, len(tokens))
        cosines = unit[first:last] @ unit[: last - 1].T
        after = torch.ones_like(cosines, dtype=torch.bool).triu_(first)
        near = cosines.masked_fill_(after, -torch.inf).topk(min(NEAREST, last - 1)).indices
        rows = tokens[first:last].double()
        products = torch.stack([torch.linalg.vecdot(rows, tokens[other].double()) for other in near.T], dim=1)
        exact = products / lengths[first:last, None] / lengths[near]
        is_earlier = near < torch.arange(first, last)[:, None]
        largest.append(exact.masked_fill(~is_earlier, 0.0).amax(dim=1).clamp(min=0))
    return torch.cat(largest)

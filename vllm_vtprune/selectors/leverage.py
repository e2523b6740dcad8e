"""Leverage: the tokens that hold most of a direction for themselves, less what is like a better one.

SFPruner's scores in one pass, without the steps of a greedy method. Ridge leverage scores are low for tokens whose
directions many others hold too; the mask then lets each token suppress those like it that score lower. No code is
public and the rule follows a summary of the paper: the ridge (:data:`RIDGE`) and the mask's form are ours, and the
paper's weights by relevance and saliency are left out.
"""

from sys import float_info
from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.similarity import squared_lengths, unit_rows

RIDGE = 1.0  # of the mean eigenvalue of V V^T, which is the tokens' mean squared length
DECIMALS = 10  # of scores and cosines: equal tokens differ by less
TINY = float_info.min
BLOCK = 64  # rows whose products are computed at once
STRETCH = 1024  # columns turned to float64 at once
NEAREST = 2  # tokens whose cosine with a token is computed again in float64


class Leverage(Method):
    method: Literal["leverage"] = "leverage"
    idea = "highest ridge leverage scores, discounted by similarity to a higher-scoring token"
    paper = "SFPruner: Structured Redundancy Modeling for Efficient Visual Token Pruning in High-Resolution MLLMs"
    arxiv = "2607.23046"
    cost = "pairwise"
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Positions ``(k,)``, highest score first; equal scores by position.

        The score of a token of ``V = embeds (N, d)`` is ``v_i^T (V^T V + ridge I)^-1 v_i``, times 1 less its largest
        cosine, if above 0, with a token whose leverage is higher, or equal at a smaller position. It does not depend on
        ``k``.
        """
        energy = squared_lengths(features.embeds)
        scores = ridge_leverage(features.embeds, float(energy.mean().clamp(min=TINY)) * RIDGE)
        ranking = scores.sort(descending=True, stable=True).indices
        likeness = torch.empty_like(scores)
        likeness[ranking] = likeness_to_those_before(features.embeds[ranking])
        return (scores * (1 - likeness).round(decimals=DECIMALS)).sort(descending=True, stable=True).indices[:k]


def ridge_leverage(tokens: Tensor, ridge: float) -> Tensor:
    """``(N,)`` ridge leverage scores of ``tokens (N, d)``, from 0 to 1, in float64.

    With the smaller of their Gram matrices: the inverse of ``V V^T + ridge I`` has ``(1 - score) / ridge`` on its
    diagonal.
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
    """``(m, m)`` products of the ``rows (m, l)`` with each other in float64, on and below the diagonal."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for stretch in torch.split(rows, STRETCH, dim=1):
        exact = stretch.double()
        for first in range(0, len(rows), BLOCK):
            last = min(first + BLOCK, len(rows))
            gram[first:last, :last].addmm_(exact[first:last], exact[:last].T)
    return gram


def likeness_to_those_before(tokens: Tensor) -> Tensor:
    """``(N,)``: the largest cosine, if above 0, of each of the ``tokens (N, d)`` with one before it, in float64.

    Those with the largest cosines are found in float32.
    """
    unit = unit_rows(tokens)
    lengths = squared_lengths(tokens).sqrt().clamp(min=TINY)
    found = [torch.zeros(1, dtype=torch.float64)]
    for first in range(1, len(tokens), BLOCK):
        last = min(first + BLOCK, len(tokens))
        cosines = unit[first:last] @ unit[: last - 1].T
        after = torch.ones_like(cosines, dtype=torch.bool).triu_(first)
        near = cosines.masked_fill_(after, -torch.inf).topk(min(NEAREST, last - 1)).indices
        rows = tokens[first:last].double()
        products = torch.stack([torch.linalg.vecdot(rows, tokens[one].double()) for one in near.T], dim=1)
        exact = products / lengths[first:last, None] / lengths[near]
        before = near < torch.arange(first, last)[:, None]
        found.append(exact.masked_fill(~before, 0.0).amax(dim=1).clamp(min=0))
    return torch.cat(found)

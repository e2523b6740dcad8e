"""Leverage: the tokens that hold most of a direction for themselves, less what is like a better one.

"SFPruner: Structured Redundancy Modeling for Efficient Visual Token Pruning in High-Resolution MLLMs"
(arXiv 2607.23046): scores in one pass, without the steps of a greedy method. Ridge leverage scores are low for tokens
whose directions many others hold too; the mask then lets each token suppress those like it that score lower. No code is
public and the rule follows a summary of the paper: the ridge (:data:`RIDGE`) and the mask's form are ours, and the
paper's weights by relevance and saliency are left out.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy

RIDGE = 1.0  # of the mean eigenvalue of V V^T, which is the tokens' mean squared length
DECIMALS = 10  # of scores and cosines: equal tokens differ by less
TINY = torch.finfo(torch.float64).tiny


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)``, highest score first; equal scores by position.

    The score of a token of ``V = embeds (N, d)`` is ``v_i^T (V^T V + ridge I)^-1 v_i``, times 1 less its largest
    cosine, if above 0, with a token whose leverage is higher, or equal at a smaller position. It does not depend on
    ``k``.
    """
    tokens = features.embeds.double()
    products = tokens @ tokens.T
    energy = products.diagonal().clone()
    scores = ridge_leverage(tokens, products, float(energy.mean().clamp(min=TINY)) * RIDGE)
    lengths = energy.sqrt().clamp(min=TINY)
    cosines = products.div_(lengths).div_(lengths[:, None])  # in place: N x N is 800 MB for 10,000 tokens
    rank = scores.sort(descending=True, stable=True).indices.argsort()
    likeness = cosines.masked_fill_(rank >= rank[:, None], 0.0).amax(dim=1)
    return (scores * (1 - likeness).round(decimals=DECIMALS)).sort(descending=True, stable=True).indices[:k]


def ridge_leverage(tokens: Tensor, products: Tensor, ridge: float) -> Tensor:
    """``(N,)`` ridge leverage scores of ``tokens (N, d)``, from 0 to 1, with the smaller of their Gram matrices.

    ``products (N, N)`` are those of the tokens; the inverse of ``V V^T + ridge I`` has ``(1 - score) / ridge`` on its
    diagonal. All in float64.
    """
    wide = tokens.shape[0] <= tokens.shape[1]
    gram = products.clone() if wide else tokens.T @ tokens
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    if wide:
        scores = 1 - ridge * torch.cholesky_inverse(factor).diagonal()
    else:
        scores = torch.linalg.solve_triangular(factor, tokens.T, upper=False).square().sum(dim=0)
    return scores.round(decimals=DECIMALS)

"""Greedy coverage: the tokens whose cosines with all others are, together, largest. SCOPE and CoverPruner share it.

A token's gain, the sum over all tokens of what it adds to their cosine with the nearest chosen one, can only fall as
tokens are chosen. So an old gain is an upper bound, and a step looks again only at the tokens with the largest bounds:
the picks are those of the full search.
"""

from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.similarity import unit_rows

BLOCK = 16  # gains computed at once


def greedy_coverage(rows: Tensor, importance: Tensor, k: int) -> Tensor:
    """Positions ``(k,)`` in order of selection: each time the largest gain times importance, the first of equal ones.

    Args:
        rows: ``(N, d)``; a negative cosine of two of them counts as 0.
        importance: ``(N,)`` in float64, not negative.
        k: how many, ``1..N``.
    """
    unit = unit_rows(rows)
    cosines = (unit @ unit.T).clamp_(min=0)
    covered = torch.zeros_like(cosines[0])
    bounds = cosines.sum(dim=1, dtype=torch.float64) * importance
    known = torch.ones_like(bounds, dtype=torch.bool)  # the bound is the gain
    order: list[int] = []
    while len(order) < k:
        best = bounds.argmax()
        if not (known[best] or bounds[best] <= 0):
            block = torch.cat([best[None], bounds.topk(min(BLOCK, len(bounds))).indices])
            gains = (cosines[block] - covered).clamp_(min=0).sum(dim=1, dtype=torch.float64)
            bounds[block] = torch.where(bounds[block] > -torch.inf, gains * importance[block], -torch.inf)
            known[block] = True
            continue
        order.append(int(best))
        bounds[best] = -torch.inf
        torch.maximum(covered, cosines[best], out=covered)
        known.zero_()
    return torch.tensor(order, device=rows.device)

"""Greedy coverage, shared by SCOPE and CoverPruner: maximise the sum of each token's largest cosine with a kept one.

The gain of a token is the increase of that sum. Gains never grow as tokens are kept (submodularity), so an old gain is
an upper bound, and a step recomputes only the largest bounds. The result equals that of the full search.
"""

from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.similarity import unit_rows

BLOCK = 16  # gains recomputed at once


def greedy_coverage(rows: Tensor, importance: Tensor, k: int) -> Tensor:
    """Indices ``(k,)`` in order of selection: the largest gain times importance; ties go to the smallest index.

    Args:
        rows: ``(N, d)``; negative cosines count as 0.
        importance: ``(N,)`` float64, at least 0.
        k: number of tokens, ``1..N``.
    """
    unit = unit_rows(rows)
    cosines = (unit @ unit.T).clamp_(min=0)
    covered = torch.zeros_like(cosines[0])
    bounds = cosines.sum(dim=1, dtype=torch.float64) * importance
    is_exact = torch.ones_like(bounds, dtype=torch.bool)  # the bound is the gain
    order: list[int] = []
    while len(order) < k:
        best = bounds.argmax()
        if not (is_exact[best] or bounds[best] <= 0):
            block = torch.cat([best[None], bounds.topk(min(BLOCK, len(bounds))).indices])
            gains = (cosines[block] - covered).clamp_(min=0).sum(dim=1, dtype=torch.float64)
            bounds[block] = torch.where(bounds[block] > -torch.inf, gains * importance[block], -torch.inf)
            is_exact[block] = True
            continue
        order.append(int(best))
        bounds[best] = -torch.inf
        torch.maximum(covered, cosines[best], out=covered)
        is_exact.zero_()
    return torch.tensor(order, device=rows.device)

"""AdaptPrune: the most important token that is neither near nor like those chosen.

"Multi-Cue Adaptive Visual Token Pruning for Large Vision-Language Models", Eq. 1-3 and Algorithm 1: soft non-maximum
suppression over three cues. The constants are those of the published code. Two things differ, because nothing of the
language model is read: the scores are the policy's ``importance``, and the similarity is that of the input embeddings
instead of a layer's keys, for which ``sigma_s`` has not been tuned.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.importance import importance_map
from vllm_vtprune.selectors.similarity import unit_rows


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in order of selection.

    Args:
        features: ``embeds (N, d)`` and a grid or tiles. All tiles share one budget; no token suppresses another tile's.
        k: tokens to keep, ``1..N``.
        policy: ``importance``; ``correction``: prefer the centre of each tile; ``distance``: suppress only tokens
            within ``radius`` cells, by ``sigma_d``; ``similarity``: suppress by cosine and ``sigma_s``. With neither of
            the last two, nothing is suppressed: the most important tokens are kept.
        text_embeds: ``(M, d)``, read where ``importance`` is ``relevance``.
    """
    scores = importance_map(features, policy, text_embeds)
    tile, row, column = (torch.empty_like(scores) for _ in range(3))
    for i, (positions, (rows, columns)) in enumerate(features.planes()):
        cells = torch.arange(rows * columns, device=scores.device)
        tile[positions] = float(i)
        row[positions], column[positions] = (cells // columns).double(), (cells % columns).double()
        if policy.correction:
            scores[positions] *= centre_mask(rows, columns).flatten().to(scores.device)
    if not (policy.distance or policy.similarity):
        return scores.sort(descending=True, stable=True).indices[:k]

    assert policy.sigma_d is not None
    assert policy.sigma_s is not None
    assert policy.radius is not None
    unit = unit_rows(features.embeds)
    left = torch.ones_like(scores, dtype=torch.bool)
    order = []
    for _ in range(k):
        pick = int(scores.argmax())
        order.append(pick)
        left[pick] = False
        scores[pick] = -torch.inf
        near = left & (tile == tile[pick])
        squared = (row - row[pick]).square_().add_((column - column[pick]).square_())
        if policy.distance:
            near &= squared <= policy.radius * policy.radius
        suppressed = near.nonzero()[:, 0]
        decay = torch.ones_like(scores[suppressed])
        if policy.distance:
            decay *= torch.exp(-squared[suppressed] / policy.sigma_d / policy.sigma_d / 2)
        if policy.similarity:
            unlike = 1 - (unit[suppressed] @ unit[pick]).double()
            decay *= torch.exp(-(unlike / policy.sigma_s).square() / 2)
        scores[suppressed] *= 1 - decay
    return torch.tensor(order, device=scores.device)


def centre_mask(rows: int, columns: int) -> Tensor:
    """``(rows, columns)`` in float64: a Gaussian about the centre, its sigma half the grid's height and width."""
    down, across = (
        torch.exp(-((2 * torch.arange(cells, dtype=torch.float64) - cells + 1) / cells).square() / 2)
        for cells in (rows, columns)
    )
    return torch.outer(down / down.max(), across / across.max())

"""VisPruner: half by the CLS token's attention, half by thinning out duplicates among the rest."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.similarity import unit_rows

IMPORTANT = 0.5  # share of the budget that goes by attention
PER_ROUND = 8  # duplicates removed at once
BLOCK = 32  # tokens looked at first in a round
MOST_AT_ONCE = 512  # tokens looked at together


class VisPruner(Method):
    method: Literal["vispruner"] = "vispruner"
    idea = "half by CLS attention, half by removing duplicates from the rest"
    paper = "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs"
    arxiv = "2412.01818"
    cost = "pairwise"
    needs = frozenset({"encoder", "cls_attention"})
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Positions ``(k,)``: the important ones, then the diverse ones, each by ``cls_attention (N,)``.

        The rest stands in order of attention. Each round compares every other token with those in between, by cosine of
        ``encoder (N, d_v)``, and removes those with the nearest match.
        """
        assert features.cls_attention is not None
        ranking = features.cls_attention.sort(descending=True, stable=True).indices
        important = int(k * IMPORTANT)
        rest = ranking[important:]
        return torch.cat([ranking[:important], rest[thin_out(unit_rows(features.encoder[rest]), k - important)]])


def thin_out(unit: Tensor, count: int) -> Tensor:
    """``(count,)`` rows of ``unit (R, d_v)`` that stay, ascending.

    A token's best match among all that are left bounds its best match in any round from above, so a round looks only at
    the tokens with the largest bounds.
    """
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    bounds = cosines.amax(dim=1)
    left = torch.arange(len(unit), device=unit.device)
    while (surplus := len(left) - count) > 0:
        even = left[::2]
        between, among = torch.full_like(bounds, -torch.inf), torch.full_like(bounds, -torch.inf)
        between[left[1::2]] = 0
        among[left] = 0
        removed = min(PER_ROUND, surplus, len(even))
        candidates = even[bounds[even].sort(descending=True, stable=True).indices]
        nearest = torch.full_like(bounds, -torch.inf)
        looked_at, block = 0, BLOCK
        while looked_at < len(candidates):
            rows = candidates[looked_at : looked_at + block]
            matches = cosines[rows]
            nearest[rows] = (matches + between).amax(dim=1)
            bounds[rows] = (matches + among).amax(dim=1)
            looked_at, block = looked_at + len(rows), min(2 * block, MOST_AT_ONCE)
            if looked_at < len(candidates) and nearest.topk(removed).values[-1] > bounds[candidates[looked_at]]:
                break
        duplicates = nearest.sort(descending=True, stable=True).indices[:removed]
        among[duplicates] = -torch.inf
        left = (among == 0).nonzero()[:, 0]
    return left

"""VisPruner: half by CLS attention, half by removing duplicates among the remaining tokens."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.similarity import unit_rows

IMPORTANT = 0.5  # share of the budget selected by attention
PER_ROUND = 8  # duplicates removed per round
BLOCK = 32  # first block of tokens examined in a round
MOST_AT_ONCE = 512  # largest block


class VisPruner(Method):
    method: Literal["vispruner"] = "vispruner"
    idea = "half by CLS attention, half by removing duplicates from the rest"
    paper = "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs"
    arxiv = "2412.01818"
    cost = "pairwise"
    needs = frozenset({"encoder", "cls_attention"})
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``: the important tokens, then the diverse ones, each by ``cls_attention (N,)``.

        Remaining tokens are in order of attention. Each round splits them alternately into sets A and B, compares A
        with B by cosine of ``encoder (N, d_v)``, and removes those of A with the most similar match.
        """
        assert features.cls_attention is not None
        ranking = features.cls_attention.sort(descending=True, stable=True).indices
        important = int(k * IMPORTANT)
        others = ranking[important:]
        diverse = others[remove_duplicates(unit_rows(features.encoder[others]), k - important)]
        return torch.cat([ranking[:important], diverse])


def remove_duplicates(unit: Tensor, count: int) -> Tensor:
    """``(count,)`` indices of the rows of ``unit (R, d_v)`` to keep, ascending.

    A token's best match among all remaining tokens bounds its best match in later rounds from above, so a round
    examines only the tokens with the largest bounds.
    """
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    bounds = cosines.amax(dim=1)
    remaining = torch.arange(len(unit), device=unit.device)
    while (surplus := len(remaining) - count) > 0:
        even = remaining[::2]
        between, among = torch.full_like(bounds, -torch.inf), torch.full_like(bounds, -torch.inf)
        between[remaining[1::2]] = 0
        among[remaining] = 0
        removed = min(PER_ROUND, surplus, len(even))
        candidates = even[bounds[even].sort(descending=True, stable=True).indices]
        nearest = torch.full_like(bounds, -torch.inf)
        examined, block = 0, BLOCK
        while examined < len(candidates):
            rows = candidates[examined : examined + block]
            matches = cosines[rows]
            nearest[rows] = (matches + between).amax(dim=1)
            bounds[rows] = (matches + among).amax(dim=1)
            examined, block = examined + len(rows), min(2 * block, MOST_AT_ONCE)
            if examined < len(candidates) and nearest.topk(removed).values[-1] > bounds[candidates[examined]]:
                break
        duplicates = nearest.sort(descending=True, stable=True).indices[:removed]
        among[duplicates] = -torch.inf
        remaining = (among == 0).nonzero()[:, 0]
    return remaining

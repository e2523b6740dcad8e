"""DivPrune: greedy max-min diversity under cosine distance.

A running maximum of the cosines with the kept tokens makes a step O(N).
"""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.similarity import ComparesFeatures, unit_rows

SAME = 1 - 1e-6  # larger cosines may differ from it by rounding only


class DivPrune(ComparesFeatures):
    method: Literal["divprune"] = "divprune"
    idea = "greedy choice of the token least similar to those kept"
    paper = "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models"
    arxiv = "2503.02175"
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` in order of selection, by cosine of the rows that ``self.features`` names.

        The first token is the one whose nearest neighbour is farthest.
        """
        unit = unit_rows(self.compared_rows(features))
        cosines = unit @ unit.T
        cosines.clamp_(max=SAME).fill_diagonal_(-torch.inf)  # in place: N x N is 400 MB for 10,000 tokens
        pick = int(cosines.amax(dim=1).argmin())
        twin = int(cosines[pick].argmax())
        if int(cosines[twin].argmax()) == pick:  # a tie, which asymmetric rounding of the product may hide
            pick = min(pick, twin)
        nearest = torch.full_like(cosines[0], -torch.inf)  # largest cosine with a kept token
        is_kept = torch.zeros_like(nearest, dtype=torch.bool)
        order = [pick]
        for _ in range(k - 1):
            is_kept[pick] = True
            torch.maximum(nearest, cosines[pick], out=nearest)
            pick = int(nearest.masked_fill(is_kept, torch.inf).argmin())
            order.append(pick)
        return torch.tensor(order, device=unit.device)

"""DART: a few pivots, and the tokens least similar to them.

The paper's pivots are four visual and four text tokens of a layer of the language model; here, before prefill, eight
visual tokens.
"""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.similarity import unit_rows

PIVOTS = 8


class DART(Method):
    method: Literal["dart"] = "dart"
    idea = "a few tokens of largest norm, and those least similar to them"
    paper = "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More"
    arxiv = "2502.11494"
    cost = "ranking"
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``: the pivots (at most half of ``k``), then equally many tokens per pivot.

        Pivots are the tokens of ``embeds (N, d)`` with the largest L1 norm. Each selects the remaining tokens with the
        smallest cosine.
        """
        norms = torch.linalg.vector_norm(features.embeds.float(), ord=1, dim=1, dtype=torch.float64)
        pivots = norms.sort(descending=True, stable=True).indices[: max(1, min(PIVOTS, k // 2))]
        unit = unit_rows(features.embeds)
        cosines = unit[pivots] @ unit.T
        cosines[:, pivots] = torch.inf
        order = [pivots]
        per_pivot, extra = divmod(k - len(pivots), len(pivots))
        for i, row in enumerate(cosines):
            selected = row.sort(stable=True).indices[: per_pivot + (i < extra)]
            cosines[:, selected] = torch.inf
            order.append(selected)
        return torch.cat(order)

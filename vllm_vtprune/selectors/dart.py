"""DART: a few pivots, and the tokens least like them.

The paper takes four visual and four text tokens of a layer of the language model as pivots; before prefill, all eight
are visual tokens.
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
        """Positions ``(k,)``: the pivots, at most half of them, then for each pivot in turn the same number of tokens.

        Pivots are the tokens of ``embeds (N, d)`` with the largest L1 norm; each brings the remaining tokens with the
        smallest cosine.
        """
        norms = torch.linalg.vector_norm(features.embeds.float(), ord=1, dim=1, dtype=torch.float64)
        pivots = norms.sort(descending=True, stable=True).indices[: max(1, min(PIVOTS, k // 2))]
        unit = unit_rows(features.embeds)
        cosines = unit[pivots] @ unit.T
        cosines[:, pivots] = torch.inf
        order = [pivots]
        each, extra = divmod(k - len(pivots), len(pivots))
        for i, row in enumerate(cosines):
            brought = row.sort(stable=True).indices[: each + (i < extra)]
            cosines[:, brought] = torch.inf
            order.append(brought)
        return torch.cat(order)

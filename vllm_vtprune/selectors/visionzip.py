"""VisionZip: the tokens with the highest CLS attention, and a few into which all others are merged.

The paper merges before the projector; here, groups come from the encoder's keys and input embeddings are merged.
"""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.merged import Merged, group_means
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.similarity import unit_rows

MOST_CONTEXTUAL = 30


class VisionZip(Method):
    method: Literal["visionzip"] = "visionzip"
    idea = "highest CLS attention, plus a few tokens that the others merge into"
    paper = "VisionZip: Longer is Better but Not Necessary in Vision Language Models"
    arxiv = "2412.04467"
    cost = "pairwise"
    needs = frozenset({"cls_attention", "keys"})
    merges = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Merged:
        """Dominant tokens by ``cls_attention (N,)``, then contextual ones at a uniform stride over the remaining ones.

        Every other token is assigned to the contextual token most similar in ``keys (N, d_k)``. A contextual token
        gains the mean of its assigned tokens and keeps its position.
        """
        assert features.cls_attention is not None
        assert features.keys is not None
        contextual = contextual_count(k)
        ranking = features.cls_attention.sort(descending=True, stable=True).indices
        dominant, remaining = ranking[: k - contextual], ranking[k - contextual :].sort().values
        if contextual == 0:
            return Merged(dominant, features.embeds[dominant])
        stride = max(1, len(remaining) // contextual)
        targets = remaining[::stride][:contextual]
        others = remaining[torch.isin(remaining, targets, invert=True)]
        keys = unit_rows(features.keys)
        group = (keys[others] @ keys[targets].T).argmax(dim=1)
        tokens = features.embeds.float()
        merged = (tokens[targets] + group_means(tokens[others], group, contextual)).to(features.embeds.dtype)
        return Merged(torch.cat([dominant, targets]), torch.cat([features.embeds[dominant], merged]))


def contextual_count(k: int) -> int:
    """Contextual tokens among ``k``: the paper's 10, 20 and 30 of 64, 128 and 192; 30 above."""
    return min((5 * k + 16) // 32, MOST_CONTEXTUAL)

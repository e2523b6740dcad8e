"""PruMerge: the outliers of CLS attention, with similar tokens merged into them.

The variant without uniform samples. The paper merges before the projector; here, groups come from the encoder's keys
and input embeddings are merged.
"""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.merged import Merged
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.outliers import upper_outliers
from vllm_vtprune.selectors.similarity import unit_rows

MERGED_PER_TOKEN = 32  # tokens merged into each kept one


class PruMerge(Method):
    method: Literal["prumerge"] = "prumerge"
    idea = "CLS attention outliers, merged with similar tokens; one token for the rest"
    paper = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"
    arxiv = "2403.15388"
    cost = "pairwise"
    needs = frozenset({"cls_attention", "keys"})
    equivariant = True
    merges = True
    own_count = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Merged:
        """The ``k - 1`` tokens with the highest ``cls_attention (N,)``, and one for all others.

        Each of the former gains the attention-weighted sum of the 32 other tokens most similar in ``keys (N, d_k)``.
        The last is the attention-weighted sum of all others, at the position of the one with the highest attention.
        """
        assert features.cls_attention is not None
        assert features.keys is not None
        ranking = features.cls_attention.sort(descending=True, stable=True).indices
        kept, others = ranking[: k - 1], ranking[k - 1 :]
        tokens, weights = features.embeds.float(), features.cls_attention.float()
        last = weights[others] @ tokens[others]
        keys = unit_rows(features.keys)
        nearest = others[(keys[kept] @ keys[others].T).topk(min(MERGED_PER_TOKEN, len(others))).indices]
        merged = torch.nn.functional.embedding_bag(nearest, tokens, mode="sum", per_sample_weights=weights[nearest])
        embeds = torch.cat([tokens[kept] + merged, last[None]])
        return Merged(ranking[:k], embeds.to(features.embeds.dtype))

    def count(self, features: VisualFeatures, text_embeds: Tensor | None) -> int:
        """The number of outliers of CLS attention, plus one for all others."""
        assert features.cls_attention is not None
        return upper_outliers(features.cls_attention) + 1

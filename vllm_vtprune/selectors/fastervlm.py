"""FasterVLM: the tokens with the highest CLS attention."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor
from vllm_vtprune.selectors.method import Method


class FasterVLM(Method):
    method: Literal["fastervlm"] = "fastervlm"
    idea = "highest CLS attention"
    paper = "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster"
    arxiv = "2412.01818"
    cost = "ranking"
    needs = frozenset({"cls_attention"})
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)``, highest ``cls_attention (N,)`` first."""
        assert features.cls_attention is not None
        return features.cls_attention.sort(descending=True, stable=True).indices[:k]

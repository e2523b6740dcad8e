"""SCOPE: greedy coverage in the encoder's space, weighted by CLS attention."""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor
from vllm_vtprune.selectors.coverage import greedy_coverage
from vllm_vtprune.selectors.method import Method


class SCOPE(Method):
    method: Literal["scope"] = "scope"
    idea = "greedy coverage of all tokens, weighted by CLS attention"
    paper = "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs"
    arxiv = "2510.24214"
    needs = frozenset({"encoder", "cls_attention"})
    equivariant = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` in order of selection, by cosines of ``encoder (N, d_v)`` and by ``cls_attention (N,)``."""
        assert features.cls_attention is not None
        return greedy_coverage(features.encoder, features.cls_attention.double(), k)

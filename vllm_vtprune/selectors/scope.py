"""SCOPE: the token that covers most of what is not yet covered, weighted by the CLS token's attention.

"SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs".
"""

from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.coverage import greedy_coverage


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` in order of selection, by cosine of ``encoder (N, d_v)`` and ``cls_attention (N,)``."""
    assert features.cls_attention is not None
    return greedy_coverage(features.encoder, features.cls_attention.double(), k)

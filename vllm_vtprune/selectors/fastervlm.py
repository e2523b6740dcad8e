"""FasterVLM: the tokens that the vision encoder's CLS token attends to most.

"[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster".
"""

from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)``, most ``cls_attention (N,)`` first."""
    assert features.cls_attention is not None
    return features.cls_attention.sort(descending=True, stable=True).indices[:k]

"""What the feature cache keeps, and what it forgets."""

import torch

from vllm_vtprune.cache import FeatureCache
from vllm_vtprune.features import VisualFeatures


def features(tokens: int) -> VisualFeatures:
    """Of 8 bytes a token."""
    return VisualFeatures(encoder=torch.zeros(tokens, 1), embeds=torch.zeros(tokens, 1))


def test_features_are_kept_up_to_their_bytes() -> None:
    cache = FeatureCache(80)
    cache.put("a", features(5))
    cache.put("b", features(4))
    assert cache.get("a") is not None
    cache.put("c", features(3))
    assert (cache.get("b"), cache.nbytes) == (None, 64), "b was used longest ago"
    cache.put("a", features(11))
    assert (cache.get("a"), cache.nbytes) == (None, 24), "too large, and the old ones of that key are gone"

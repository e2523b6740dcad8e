"""Average pooling: the tokens whose surroundings are most important. A baseline of AdaptPrune's paper (Table 5 f)."""

from torch import Tensor
from torch.nn.functional import avg_pool2d

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.importance import importance_map


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Tensor:
    """Positions ``(k,)`` by the mean importance of the 3 x 3 cells around each, as far as they lie on the tile."""
    scores = importance_map(features, policy, text_embeds)
    for positions, grid in features.planes():
        plane = scores[positions].view(1, *grid)
        scores[positions] = avg_pool2d(plane, 3, stride=1, padding=1, count_include_pad=False).flatten()
    return scores.sort(descending=True, stable=True).indices[:k]

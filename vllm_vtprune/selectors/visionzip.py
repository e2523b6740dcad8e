"""VisionZip: the tokens with the most CLS attention, and a few that take in all others.

"VisionZip: Longer is Better but Not Necessary in Vision Language Models". The paper merges before the projector; here
the encoder's keys say what belongs together, and the input embeddings are merged.
"""

import torch
from torch import Tensor

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.merged import Merged, group_means
from vllm_vtprune.selectors.similarity import unit_rows

MOST_CONTEXTUAL = 30


def contextual_count(k: int) -> int:
    """How many of ``k`` tokens take in others: the paper's 10, 20 and 30 of 64, 128 and 192, and 30 above."""
    return min((5 * k + 16) // 32, MOST_CONTEXTUAL)


def select(features: VisualFeatures, k: int, policy: PruningPolicy, text_embeds: Tensor | None) -> Merged:
    """Dominant tokens by ``cls_attention (N,)``, then contextual ones at a uniform stride over the rest.

    Every other token goes to the contextual one most like it in ``keys (N, d_k)``, to which the mean of those it gets
    is added. It stands where the contextual token stood.
    """
    assert features.cls_attention is not None
    assert features.keys is not None
    contextual = contextual_count(k)
    ranking = features.cls_attention.sort(descending=True, stable=True).indices
    dominant, rest = ranking[: k - contextual], ranking[k - contextual :].sort().values
    if contextual == 0:
        return Merged(dominant, features.embeds[dominant])
    stride = max(1, len(rest) // contextual)
    targets = rest[::stride][:contextual]
    others = rest[torch.isin(rest, targets, invert=True)]
    keys = unit_rows(features.keys)
    home = (keys[others] @ keys[targets].T).argmax(dim=1)
    tokens = features.embeds.float()
    merged = (tokens[targets] + group_means(tokens[others], home, contextual)).to(features.embeds.dtype)
    return Merged(torch.cat([dominant, targets]), torch.cat([features.embeds[dominant], merged]))

"""ToMe: merge the most similar pairs until ``k`` tokens remain.

The paper merges in each layer of the encoder; here, in as many rounds on the keys of one layer. A merged token is the
mean of its input embeddings.
"""

from math import ceil
from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.merged import Merged, group_means
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.similarity import unit_rows

ROUNDS = 24  # layers of CLIP-L


class ToMe(Method):
    method: Literal["tome"] = "tome"
    idea = "repeated merging of the most similar pairs"
    paper = "Token Merging: Your ViT But Faster"
    arxiv = "2210.09461"
    cost = "pairwise"
    needs = frozenset({"keys"})
    merges = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Merged:
        """Merged tokens, largest groups first, each at the position of one of its members.

        A round splits the tokens alternately into sets A and B, finds for each of A the most similar of B by cosine of
        ``keys (N, d_k)``, and merges the most similar pairs into B's token.
        """
        assert features.keys is not None
        n = features.num_tokens
        per_round = ceil((n - k) / ROUNDS)
        keys = unit_rows(features.keys)
        group = torch.arange(n, device=keys.device)  # index of the token that each token is merged into
        remaining = group.clone()
        while len(remaining) > k:
            unit = unit_rows(group_means(keys, group, n)[remaining])
            similarity, partner = (unit[::2] @ unit[1::2].T).max(dim=1)
            merging = similarity.sort(descending=True, stable=True).indices[: min(per_round, len(remaining) - k)]
            moves = torch.arange(n, device=keys.device)
            moves[remaining[::2][merging]] = remaining[1::2][partner[merging]]
            group = moves[group]
            remaining = torch.bincount(group, minlength=n).nonzero()[:, 0]
        sizes = torch.bincount(group, minlength=n)[remaining]
        by_size = sizes.sort(descending=True, stable=True).indices
        embeds = group_means(features.embeds.float(), group, n)[remaining].to(features.embeds.dtype)
        return Merged(remaining[by_size], embeds[by_size])

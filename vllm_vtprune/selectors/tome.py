"""ToMe: merge the most similar pairs until as many tokens are left as wanted.

The paper merges some tokens in each layer of the encoder; here it is as many rounds on the keys of one layer, and what
was merged is the mean of its input embeddings.
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
        """Tokens made of most first, each at the position of one of those that it is made of.

        A round splits the tokens into every other one and those in between, finds for each of the former the most
        similar of the latter by cosine of ``keys (N, d_k)``, and merges the most similar pairs into the latter's place.
        """
        assert features.keys is not None
        n = features.num_tokens
        per_round = ceil((n - k) / ROUNDS)
        keys = unit_rows(features.keys)
        home = torch.arange(n, device=keys.device)  # where each token has gone
        left = home.clone()
        while len(left) > k:
            unit = unit_rows(group_means(keys, home, n)[left])
            similarity, partner = (unit[::2] @ unit[1::2].T).max(dim=1)
            merging = similarity.sort(descending=True, stable=True).indices[: min(per_round, len(left) - k)]
            moves = torch.arange(n, device=keys.device)
            moves[left[::2][merging]] = left[1::2][partner[merging]]
            home = moves[home]
            left = torch.bincount(home, minlength=n).nonzero()[:, 0]
        sizes = torch.bincount(home, minlength=n)[left]
        by_size = sizes.sort(descending=True, stable=True).indices
        embeds = group_means(features.embeds.float(), home, n)[left].to(features.embeds.dtype)
        return Merged(left[by_size], embeds[by_size])

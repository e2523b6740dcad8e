"""TRIM: the tokens most similar to the question, and the mean of all others.

The paper compares in CLIP's joint space; here, in the language model's input space, with the question's nouns.
"""

from typing import Literal

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor
from vllm_vtprune.selectors.merged import Merged
from vllm_vtprune.selectors.outliers import upper_outliers
from vllm_vtprune.selectors.similarity import ReadsText, text_relevance, unit_rows

ROUNDING = 1e-6  # rounding error of cosines, which must not make outliers among equal tokens


class TRIM(ReadsText):
    method: Literal["trim"] = "trim"
    idea = "most similar to the question's nouns, plus the mean of the rest"
    paper = "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs"
    arxiv = "2409.10994"
    cost = "ranking"
    equivariant = True
    merges = True
    own_count = True

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Merged:
        """The ``k - 1`` tokens of ``embeds (N, d)`` most similar to the text, and one for all others.

        The last is their mean, at the position of the one most similar to the text.
        """
        ranking = similarity(features, text_embeds).sort(descending=True, stable=True).indices
        embeds = features.embeds[ranking[:k]]
        embeds[-1] = features.embeds[ranking[k - 1 :]].float().mean(dim=0)
        return Merged(ranking[:k], embeds)

    def count(self, features: VisualFeatures, text_embeds: Tensor | None) -> int:
        """The number of outliers of the similarity to the text, plus one for all others."""
        return upper_outliers(similarity(features, text_embeds), ROUNDING) + 1


def similarity(features: VisualFeatures, text_embeds: Tensor | None) -> Tensor:
    """``(N,)`` cosines with the mean of the text ``(M, d)``; without a text, with the mean of the image's tokens."""
    unit = unit_rows(features.embeds)
    text = features.embeds if text_embeds is None else text_embeds
    return text_relevance(unit, text.to(unit.dtype), "mean_token")

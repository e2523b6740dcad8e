"""ResPrune: keep the tokens whose span best reconstructs all tokens, guided by the question (Eq. 10-16).

From a seed token on, each step adds the token with the largest energy outside the span of the kept ones, times a gate
of its relevance to the text. The paper updates an orthonormal basis, O(N d) per step. Here, the same recurrence runs on
the Gram matrix ``V V^T``: a pivoted Cholesky factorisation with weighted pivots, O(N k) per step, with the same
selection.
"""

from typing import Annotated, Literal

from pydantic import Field

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.gate import gate
from vllm_vtprune.selectors.method import FamilyDefaults, Needs
from vllm_vtprune.selectors.pivots import weighted_pivots
from vllm_vtprune.selectors.similarity import TINY, ComparesFeatures, ReadsRelevance, in_range, text_relevance

ALPHA = 0.5  # default for the gate minmax; clip uses the family's


class ResPrune(ComparesFeatures, ReadsRelevance):
    method: Literal["resprune"] = "resprune"
    idea = "greedy by residual energy, weighted by similarity to the question's nouns"
    paper = "ResPrune: Text-Conditioned Subspace Reconstruction for Visual Token Pruning"
    arxiv = "2603.21105"
    uses = frozenset({"text", "encoder", "cls_attention", "grid"})
    equivariant = True
    runs_on = "device"

    gate: Literal["auto", "minmax", "clip"] = Field(
        default="auto",
        description="How similarity to the text becomes a weight: minmax scales it to 0.1..1 over the image, clip all "
        "but drops tokens unlike the text; auto: minmax.",
    )
    alpha: float | None = Field(default=None, ge=0, le=16, description="Strength of the text; null: the gate's own.")
    seed_token: Annotated[
        Literal["auto", "cls", "norm", "relevance", "mean", "center"], Needs(cls="cls_attention", center="grid")
    ] = Field(
        default="auto",
        description="The first token: the one with most CLS attention, the longest, the one most similar to the text, "
        "the nearest to the mean, or the middle of the grid; auto: cls where the encoder has a CLS token, else norm.",
    )
    rank_by: Literal["residual", "relevance"] = Field(
        default="residual", description="Rank by residual energy times the text's weight, or by the text alone."
    )

    def defaults(self, family: FamilyDefaults) -> dict[str, object]:
        gate = "minmax" if self.gate == "auto" else self.gate
        alpha = ALPHA if gate == "minmax" else family.clip_alpha
        return {"gate": gate, "alpha": alpha, "seed_token": family.attention_or_norm}

    def idle(self) -> frozenset[str]:
        # without a text, `rank_by: relevance` ranks by residual energy, so every parameter can matter
        textless = self.alpha == 0 and self.rank_by == "residual" and self.seed_token != "relevance"
        unread = {"cls_attention"} if self.seed_token not in ("auto", "cls") else set()
        unread |= {"grid"} if self.seed_token not in ("auto", "center") else set()
        return super().idle() | unread | ({"text", "relevance", "gate"} if textless else set())

    def select(self, features: VisualFeatures, k: int, text_embeds: Tensor | None) -> Tensor:
        """Indices ``(k,)`` in order of selection.

        Residual energy, and the seed tokens ``norm`` and ``mean``, use the rows that ``self.features`` names. Relevance
        uses ``embeds (N, d)``, which share a space with the text. Without a text, every gate is 1, ``rank_by`` is
        ``residual``, and the seed token ``relevance`` is ``norm``. Once the kept tokens span all others, the remaining
        ones follow by gate, then by index. Ties go to the smallest index.
        """
        tokens, energy = in_range(features.embeds.float())
        relevance = None
        if text_embeds is not None:
            relevance = text_relevance(tokens, text_embeds.float(), self.relevance)
            relevance /= energy.sqrt().clamp(min=TINY).to(relevance.dtype)
        if relevance is not None and self.rank_by == "relevance":
            return relevance.sort(descending=True, stable=True).indices[:k]
        if self.features != "projected":
            del tokens  # frees memory before the next allocation
            tokens, energy = in_range(self.compared_rows(features))
        weight = torch.ones_like(energy) if relevance is None else gate(relevance, self.gate, self.alpha or 0.0)
        return weighted_pivots(tokens, energy, weight, self._first(features, tokens, energy, relevance), k)

    def _first(self, features: VisualFeatures, tokens: Tensor, energy: Tensor, relevance: Tensor | None) -> int:
        if self.seed_token == "cls" and features.cls_attention is not None:
            return int(features.cls_attention.argmax())
        if self.seed_token == "relevance" and relevance is not None:
            return int(relevance.argmax())
        if self.seed_token == "mean":
            return int(torch.cosine_similarity(tokens, tokens.mean(dim=0, keepdim=True), eps=TINY).argmax())
        if self.seed_token == "center" and features.grid is not None:
            rows, columns = features.grid
            return (rows - 1) // 2 * columns + (columns - 1) // 2
        return int(energy.argmax())

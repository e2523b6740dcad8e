"""Similarity of tokens to each other and to the text: rows to compare, lengths, cosines."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.options import TextOptions
from vllm_vtprune.selectors.method import Method, Needs

TINY = 2.0**-126  # the smallest normal number in float32
CHUNK = 64  # rows converted to float64 at once on a CPU; they fit its cache
GPU_CHUNK = 1024  # the same on a GPU: few launches, small copies


class ReadsText(Method):
    uses = frozenset({"text"})

    text: TextOptions = Field(default=TextOptions(), description="The text that guides the choice.")


class ReadsRelevance(ReadsText):
    relevance: Literal["max", "mean", "mean_token"] = Field(
        default="max", description="Similarity to the most similar word, mean over words, or similarity to their mean."
    )


class ComparesFeatures(Method):
    uses = frozenset({"encoder"})

    features: Annotated[Literal["projected", "encoder", "both"], Needs(encoder="encoder", both="encoder")] = Field(
        default="projected", description="Compare tokens by embeddings, by what the connector reads, or by both."
    )

    def idle(self) -> frozenset[str]:
        return super().idle() | ({"features", "encoder"} if self.features == "projected" else set())

    def compared_rows(self, features: VisualFeatures) -> Tensor:
        """Rows in float32: ``embeds (N, d)``, ``encoder (N, d_v)``, or both.

        ``both`` is ``(N, d + d_v)``: concatenated, each scaled to a mean squared length of 1 for equal weight.
        """
        if self.features != "both":
            return (features.embeds if self.features == "projected" else features.encoder).float()
        spaces = (features.embeds, features.encoder)
        widths = [rows.shape[1] for rows in spaces]
        joint = features.embeds.new_empty(features.num_tokens, sum(widths), dtype=torch.float32)
        # in place, to save memory
        for columns, rows in zip(torch.split(joint, widths, dim=1), spaces, strict=True):
            columns.copy_(rows).div_(squared_lengths(rows).mean().sqrt().clamp(min=TINY))
        return joint


def chunks(rows: Tensor) -> Sequence[Tensor]:
    """Views of ``rows (N, d)``, each of so few that they may be turned to float64."""
    return torch.split(rows, CHUNK if rows.device.type == "cpu" else GPU_CHUNK)


def squared_lengths(rows: Tensor) -> Tensor:
    """``(N,)`` squared lengths of ``rows (N, d)``, float64."""
    return torch.cat([chunk.to(torch.float64, copy=True).square_().sum(dim=1) for chunk in chunks(rows)])


def unit_rows(rows: Tensor) -> Tensor:
    """``rows (N, d)`` scaled to length 1, float32; zero rows stay zero, so their cosines are 0."""
    rows = rows.float()
    norms = squared_lengths(rows).sqrt()[:, None]
    return rows / norms.clamp(min=TINY).to(rows.dtype)


def in_range(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scale all ``tokens (N, d)`` by one factor if products would leave float32's range; also their squared lengths."""
    energy = squared_lengths(tokens)
    if not 1e-18 < energy.max() < 1e18:
        tokens = tokens / energy.max().sqrt().clamp(min=TINY).float()
        energy = squared_lengths(tokens)
    return tokens, energy


def text_relevance(tokens: Tensor, text: Tensor, form: str) -> Tensor:
    """``(N,)`` cosine of each token with the text. Not normalised by the token's length.

    Args:
        tokens: ``(N, d)`` tokens of length 1.
        text: ``(M, d)`` rows of the text's words.
        form: ``max`` (largest over rows; ResPrune, Eq. 13), ``mean`` (over rows), or ``mean_token`` (with the mean
        row).
    """
    if form == "mean_token":
        text = text.mean(dim=0, keepdim=True)
    text = torch.ldexp(text, -torch.frexp(text.abs().amax()).exponent)  # keeps squares in float32's range
    cosines = tokens @ torch.nn.functional.normalize(text, dim=1, eps=TINY).T
    return cosines.mean(dim=1) if form == "mean" else cosines.amax(dim=1)

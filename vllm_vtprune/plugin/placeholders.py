"""The placeholder of an image in a prompt: one token per embedding, and text before, between and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptUpdateDetails

from vllm_vtprune.features import EMBED


@dataclass(frozen=True)
class Placeholder:
    """The placeholder of one image.

    Attributes:
        token: id of the token that stands for an embedding.
        ids: ids of all tokens; `EMBED` in place of `token`.
    """

    token: int
    ids: tuple[int, ...]

    @classmethod
    def of(cls, content: PromptUpdateDetails) -> Placeholder | None:
        """Read vLLM's placeholder; None unless exactly one token id stands for embeddings."""
        tokens = content.full
        is_embed = [True] * len(tokens) if content.is_embed is None else content.is_embed(tokens).tolist()
        ids = tuple(EMBED if embed else token for token, embed in zip(tokens, is_embed, strict=True))
        stand_ins = {token for token, embed in zip(tokens, is_embed, strict=True) if embed}
        return cls(stand_ins.pop(), ids) if len(stand_ins) == 1 else None

    @property
    def num_embeds(self) -> int:
        """Embeddings of the image."""
        return self.ids.count(EMBED)

    @property
    def is_contiguous(self) -> bool:
        """Whether there is no text between the embeddings."""
        begin = self.ids.index(EMBED)
        return self.ids[begin : begin + self.num_embeds].count(EMBED) == self.num_embeds

    def resized(self, num_embeds: int) -> Placeholder:
        """The same text before and after ``num_embeds`` contiguous embeddings."""
        assert self.is_contiguous, "with text between embeddings, use `prune`"
        begin = self.ids.index(EMBED)
        after = self.ids[begin + self.num_embeds :]
        return Placeholder(self.token, (*self.ids[:begin], *[EMBED] * num_embeds, *after))

    def prune(self, kept: Tensor) -> Placeholder:
        """Keep some of the embeddings and all of the text.

        Args:
            kept: (k,) int64 indices of the kept embeddings, on the CPU.
        """
        ids = torch.tensor(self.ids)
        is_kept = ids != EMBED
        is_kept[(~is_kept).nonzero()[kept, 0]] = True
        return Placeholder(self.token, tuple(ids[is_kept].tolist()))

    def content(self) -> PromptUpdateDetails:
        """The placeholder in vLLM's form."""
        is_embed = torch.tensor(self.ids) == EMBED
        return PromptUpdateDetails([self.token if id_ == EMBED else id_ for id_ in self.ids], lambda _: is_embed)

"""What stands in a prompt for an image: tokens that each stand for an embedding, and text before, between and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.multimodal.processing import PromptUpdateDetails

from vllm_vtprune.features import EMBED


@dataclass(frozen=True)
class Placeholder:
    """Of one image.

    Attributes:
        token: id of the token that stands for an embedding.
        ids: of all tokens; `EMBED` for those that stand for an embedding.
    """

    token: int
    ids: tuple[int, ...]

    @classmethod
    def of(cls, content: PromptUpdateDetails) -> Placeholder | None:
        """What vLLM puts in; None where several tokens stand for embeddings, or none does."""
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
    def is_run(self) -> bool:
        """Whether no text stands between the embeddings."""
        begin = self.ids.index(EMBED)
        return self.ids[begin : begin + self.num_embeds].count(EMBED) == self.num_embeds

    def resized(self, num_embeds: int) -> Placeholder:
        """A run with another number of embeddings and the same text before and after."""
        assert self.is_run, "what text stays between embeddings depends on which of them stay"
        begin = self.ids.index(EMBED)
        after = self.ids[begin + self.num_embeds :]
        return Placeholder(self.token, (*self.ids[:begin], *[EMBED] * num_embeds, *after))

    def keeping(self, kept: Tensor) -> Placeholder:
        """With some of the embeddings and all of the text.

        Args:
            kept: (k,) int64, which embeddings, on the CPU.
        """
        ids = torch.tensor(self.ids)
        stays = ids != EMBED
        stays[(~stays).nonzero()[kept, 0]] = True
        return Placeholder(self.token, tuple(ids[stays].tolist()))

    def content(self) -> PromptUpdateDetails:
        """What goes into a prompt."""
        is_embed = torch.tensor(self.ids) == EMBED
        return PromptUpdateDetails([self.token if each == EMBED else each for each in self.ids], lambda _: is_embed)

"""What stands in a prompt for an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.multimodal.processing import PromptUpdateDetails


@dataclass(frozen=True)
class Run:
    """One token for each embedding of an image, with the same tokens before and after in every prompt.

    Attributes:
        before, after: token ids of text that belong to the image.
        token: stands for an embedding.
    """

    before: tuple[int, ...]
    token: int
    after: tuple[int, ...]

    @classmethod
    def of(cls, content: PromptUpdateDetails) -> Run | None:
        """The run that vLLM puts in for an image; None where it is not one."""
        tokens = content.full
        is_embed = torch.ones(len(tokens), dtype=torch.bool) if content.is_embed is None else content.is_embed(tokens)
        places = is_embed.nonzero()[:, 0].tolist()
        if not places or places[-1] - places[0] >= len(places) or len({tokens[place] for place in places}) > 1:
            return None
        return cls(tuple(tokens[: places[0]]), tokens[places[0]], tuple(tokens[places[-1] + 1 :]))

    def content(self, num_embeds: int) -> PromptUpdateDetails:
        """For an image with so many embeddings."""
        begin = len(self.before)

        def is_embed(tokens: list[int]) -> torch.Tensor:
            places = torch.arange(len(tokens))
            return (places >= begin) & (places < begin + num_embeds)

        return PromptUpdateDetails([*self.before, *[self.token] * num_embeds, *self.after], is_embed)

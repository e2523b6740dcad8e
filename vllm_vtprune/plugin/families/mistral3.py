"""Mistral Small 3.1 and later (``Mistral3ForConditionalGeneration``): Pixtral's encoder, on images of any aspect ratio.

The connector makes one token of 2 x 2 patches. In the prompt, a token of its own stands after each row of an image's
tokens, another after the last row. A row of which nothing is kept goes with the token after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import PixtralVisionConfig
from vllm.model_executor.models.mistral3 import Mistral3ForConditionalGeneration, Mistral3MultiModalProcessor
from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_vtprune.features import EMBED, Layout
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.placeholders import Placeholder
from vllm_vtprune.plugin.processor import PruningProcessor


def across(config: Any) -> int:
    """Patches of a token in either direction."""
    size: int = config.spatial_merge_size
    return size


def means(projector: Any, patches: Tensor, sizes: Any) -> Tensor:
    """(P, C) the patches of several images, each in raster order, -> (T, C) the mean of those of each token.

    Args:
        projector: vLLM's connector.
        patches: its input.
        sizes: height and width of each image, in pixels.
    """
    merger = projector.patch_merger
    grids = [(height // merger.patch_size, width // merger.patch_size) for height, width in sizes]
    maps = zip(torch.split(patches, [rows * columns for rows, columns in grids]), grids, strict=True)
    pooled = [avg_pool2d(its.view(*grid, -1).permute(2, 0, 1), merger.spatial_merge_size) for its, grid in maps]
    return torch.cat([its.flatten(1).T for its in pooled])


class PrunedMistral3Processor(PruningProcessor, Mistral3MultiModalProcessor):
    """One image has a token for each 28 x 28 pixels."""

    family = Family(
        name="mistral3",
        clip_alpha=0.3,  # that of Qwen2.5-VL; not calibrated
        provides=frozenset({"grid", "positions"}),
        connector="multi_modal_projector",
        fixed_length=False,
        rows=means,
        merge=across,
        pooled=True,
    )

    @classmethod
    def prunes(cls, config: Any) -> bool:
        return isinstance(config.vision_config, PixtralVisionConfig)

    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        config = self.info.get_hf_config()
        unit = config.vision_config.patch_size * across(config)
        rows, columns = (pixels // unit for pixels in item["pixel_values"].data.shape[-2:])
        placeholder = self.placeholder_of(item, size, hf_kwargs)
        assert placeholder is not None
        return Layout(rows * columns * across(config) ** 2, grid=(rows, columns), prompt=placeholder.ids)

    def most_tokens(self) -> int:
        size = self.info.get_image_size_with_most_features()
        count: int = self.info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        return count

    def keeping(self, whole: Placeholder, kept: Tensor) -> Placeholder:
        """A row's break goes where the row does; after the last that stays stands what ends an image."""
        ids = whole.keeping(kept).ids
        ids = ids[ids.index(EMBED) :]
        following = (*ids[1:], EMBED)
        ends = tuple(each for each, after in zip(ids, following, strict=True) if EMBED in (each, after))
        return Placeholder(whole.token, ends)

    def prompt_text(self, prompt: list[int]) -> str:
        """What a prompt says, but for the system's turn: every prompt that has none gets a standard one."""
        vocabulary = self.info.get_tokenizer().get_vocab()
        begin, end = (vocabulary.get(token) for token in ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"))
        if begin in prompt and end in prompt:
            prompt = prompt[: prompt.index(begin)] + prompt[prompt.index(end) + 1 :]
        return super().prompt_text(prompt)


@processed_by(PrunedMistral3Processor)
class PrunedMistral3ForConditionalGeneration(PrunedModel, Mistral3ForConditionalGeneration):
    """Mistral Small 3.1, which also takes pruned images."""

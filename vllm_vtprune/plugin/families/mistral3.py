"""Mistral Small 3.1 and later (``Mistral3ForConditionalGeneration``): Pixtral's encoder, on images of any aspect ratio.

The connector merges 2 x 2 patches into a token. In the prompt, a break token follows each row of an image's tokens, and
an end token the last row. A row without kept tokens loses its break.
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


def merge_size(config: Any) -> int:
    """Patches per token in either direction."""
    size: int = config.spatial_merge_size
    return size


def means(projector: Any, patches: Tensor, sizes: Any) -> Tensor:
    """Mean of each token's patches.

    Args:
        projector: vLLM's connector.
        patches: (P, C) its input: the patches of several images, each in raster order.
        sizes: height and width of each image, in pixels.

    Returns:
        (T, C), one row per token.
    """
    merger = projector.patch_merger
    grids = [(height // merger.patch_size, width // merger.patch_size) for height, width in sizes]
    maps = zip(torch.split(patches, [rows * columns for rows, columns in grids]), grids, strict=True)
    pooled = [avg_pool2d(rows.view(*grid, -1).permute(2, 0, 1), merger.spatial_merge_size) for rows, grid in maps]
    return torch.cat([tokens.flatten(1).T for tokens in pooled])


class PrunedMistral3Processor(PruningProcessor, Mistral3MultiModalProcessor):
    """One token per 28 x 28 pixels."""

    family = Family(
        name="mistral3",
        clip_alpha=0.3,  # Qwen2.5-VL's; not calibrated
        provides=frozenset({"grid", "positions"}),
        connector="multi_modal_projector",
        fixed_length=False,
        rows=means,
        merge=merge_size,
        pooled=True,
    )

    @classmethod
    def prunes(cls, config: Any) -> bool:
        return isinstance(config.vision_config, PixtralVisionConfig)

    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        config = self.info.get_hf_config()
        unit = config.vision_config.patch_size * merge_size(config)
        rows, columns = (pixels // unit for pixels in item["pixel_values"].data.shape[-2:])
        placeholder = self.placeholder_of(item, size, hf_kwargs)
        assert placeholder is not None
        return Layout(rows * columns * merge_size(config) ** 2, grid=(rows, columns), prompt=placeholder.ids)

    def max_image_tokens(self) -> int:
        size = self.info.get_image_size_with_most_features()
        count: int = self.info.get_num_image_tokens(image_width=size.width, image_height=size.height)
        return count

    def prune_placeholder(self, placeholder: Placeholder, kept: Tensor) -> Placeholder:
        """Drop the breaks of rows without kept tokens; the end token follows the last kept row."""
        ids = placeholder.prune(kept).ids
        ids = ids[ids.index(EMBED) :]
        following = (*ids[1:], EMBED)
        kept_ids = tuple(id_ for id_, next_id in zip(ids, following, strict=True) if EMBED in (id_, next_id))
        return Placeholder(placeholder.token, kept_ids)

    def prompt_text(self, prompt: list[int]) -> str:
        """The text without the system prompt, because the chat template adds a default one."""
        vocabulary = self.info.get_tokenizer().get_vocab()
        begin, end = (vocabulary.get(token) for token in ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"))
        if begin in prompt and end in prompt:
            prompt = prompt[: prompt.index(begin)] + prompt[prompt.index(end) + 1 :]
        return super().prompt_text(prompt)


@processed_by(PrunedMistral3Processor)
class PrunedMistral3ForConditionalGeneration(PrunedModel, Mistral3ForConditionalGeneration):
    """Mistral Small 3.1 with pruned images."""

"""What the processors of Qwen's vision-language models have in common: images at their own resolution, ChatML turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plugin.items import KEPT_POSITIONS
from vllm_vtprune.plugin.processor import PruningProcessor

TURN = "<|im_start|>"
"""Begins each turn of a conversation: the speaker, a line feed, what was said."""


class QwenProcessor(PruningProcessor):
    """Mixin: the item of a pruned image also holds its grid, and where the kept embeddings stand in it.

    The engine may have an image's keys and values at hand and still needs its positions: for items that a model of
    this kind has no need to encode, it keeps what stays on the CPU (``keep_on_cpu``).
    """

    def position_fields(self, features: VisualFeatures, kept: torch.Tensor) -> Mapping[str, torch.Tensor]:
        assert features.grid is not None
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        grid = torch.tensor([1, *(merge * side for side in features.grid)])
        return {"image_grid_thw": grid, KEPT_POSITIONS: kept}

    def num_tokens(self, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> int:
        vision = self.info.get_hf_config().vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        height, width = size
        try:
            options = self._image_options(hf_kwargs)
            if options.get("do_resize", True):
                limits = dict(self.info.get_image_processor().size) | options.get("size", {})
                least = options.get("min_pixels", limits["shortest_edge"])
                most = options.get("max_pixels", limits["longest_edge"])
                height, width = smart_resize(height, width, unit, least, most)
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"an image cannot be scaled with {dict(hf_kwargs)}: {error}") from error
        return (height // unit) * (width // unit)

    def at_area(self, hf_kwargs: Mapping[str, object], area: int) -> Mapping[str, object]:
        """Other sizes, the request's and the engine's, give way in each of their forms: ``images_kwargs`` go first."""
        size = {"shortest_edge": area, "longest_edge": area}
        options = self._image_options(hf_kwargs)
        named = {name: area for name in ("min_pixels", "max_pixels") if name in options}
        given: Any = hf_kwargs.get("images_kwargs", {})
        return {**hf_kwargs, "images_kwargs": {**given, **named, "size": size, "do_resize": True}}

    def _image_options(self, hf_kwargs: Mapping[str, object]) -> dict[str, Any]:
        """What the request and the engine ask of the HF processor of images, but for what they leave to it."""
        merged = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        return {**merged, **merged.get("images_kwargs", {})}

    @property
    def image_token_id(self) -> int:
        token_id: int = self.info.get_hf_config().image_token_id
        return token_id

    def _prompt_text(self, prompt: list[int]) -> str:
        """What the turns of a prompt say, but for the system's: every prompt that has none gets a standard one."""
        tokenizer = self.info.get_tokenizer()
        turn_id = tokenizer.get_vocab().get(TURN)
        turns: list[list[int]] = [[]]
        for token in prompt:
            if token == turn_id:
                turns.append([])
            elif token != self.image_token_id:
                turns[-1].append(token)
        before, *texts = (tokenizer.decode(turn, skip_special_tokens=True) for turn in turns)
        spoken = [said for speaker, _, said in (text.partition("\n") for text in texts) if speaker.strip() != "system"]
        return "\n".join([before, *spoken])

"""Qwen2.5-VL (``Qwen2_5_VLForConditionalGeneration``): images at their own resolution, positions of three numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.items import KEPT_POSITIONS, TakesKeptEmbeddings
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import QWEN2_5_VL

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

TURN = "<|im_start|>"
"""Begins each turn of a conversation: the speaker, a line feed, what was said."""


class PrunedQwen2_5_VLProcessor(PruningProcessor, Qwen2_5_VLMultiModalProcessor):
    """The item of a pruned image keeps its grid, has no pixels, and holds embeddings and where they stand in the grid.

    The engine may have an image's keys and values at hand and still needs its positions: for items that a model of
    this kind has no need to encode, it keeps what stays on the CPU (``keep_on_cpu``).
    """

    architecture = ARCHITECTURE
    family = QWEN2_5_VL

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


_stock = compat.stock_factories(Qwen2_5_VLForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(PrunedQwen2_5_VLProcessor, info=_stock.info, dummy_inputs=_stock.dummy_inputs)
class PrunedQwen2_5_VLForConditionalGeneration(TakesKeptEmbeddings, NotesLoads, Qwen2_5_VLForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings of the tokens to keep."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Where each token of a prompt stands: exactly where it would without pruning.

        Args:
            input_tokens: L token ids.
            mm_features: images and videos of the prompt. Of one that the engine does not encode, it may have nothing
                but the fields that stay on the CPU.

        Returns:
            (3, L) time, height and width of each token, and what to add to the index of a token after the prompt to
            get its position, in all three.
        """
        if not any(_kept_positions(feature) is not None for feature in mm_features):
            return super().get_mrope_input_positions(input_tokens, mm_features)
        merge = self.config.vision_config.spatial_merge_size
        whole_tokens: list[int] = []  # the prompt, without pruning
        whole_features: list[MultiModalFeatureSpec] = []
        present = []  # of the tokens of that prompt, those that are in ours
        read = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            begin, length = feature.mm_position.offset, feature.mm_position.length
            present.append(len(whole_tokens) + torch.arange(begin - read))
            whole_tokens += input_tokens[read:begin]
            kept, size = _kept_positions(feature), length
            if kept is None:
                kept = torch.arange(length)
            else:
                size = int(_field(feature, "image_grid_thw").prod()) // merge**2
            place = PlaceholderRange(offset=len(whole_tokens), length=size)
            present.append(len(whole_tokens) + kept)
            whole_tokens += input_tokens[begin : begin + 1] * size
            whole_features.append(replace(feature, mm_position=place))
            read = begin + length
        present.append(len(whole_tokens) + torch.arange(len(input_tokens) - read))
        whole_tokens += input_tokens[read:]
        positions, delta = super().get_mrope_input_positions(whole_tokens, whole_features)
        return positions[:, torch.cat(present)], delta + len(whole_tokens) - len(input_tokens)


def _field(feature: MultiModalFeatureSpec, name: str) -> torch.Tensor:
    assert feature.data is not None, "models with positions of three numbers get at least what stays on the CPU"
    data = feature.data[name].data
    assert isinstance(data, torch.Tensor)
    return data


def _kept_positions(feature: MultiModalFeatureSpec) -> torch.Tensor | None:
    """(k,) which of an image's tokens are in the prompt; None where all are, and for other media."""
    if feature.data is None or KEPT_POSITIONS not in feature.data:
        return None
    return _field(feature, KEPT_POSITIONS)

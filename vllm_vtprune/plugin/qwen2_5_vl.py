"""Qwen2.5-VL (``Qwen2_5_VLForConditionalGeneration``): images at their own resolution, positions of three numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldConfig, PlaceholderRange
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.weights import NotesLoads
from vllm_vtprune.policy import QWEN2_5_VL

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

TURN = "<|im_start|>"
"""Begins each turn of a conversation: the speaker, a line feed, what was said."""

# Fields of an image's item, in a prompt of which any image is pruned, beside vLLM's own.
NUM_KEPT = "num_kept"  # () int64: k, or 0 where the image is not pruned
KEPT_EMBEDS = "kept_embeds"  # (k, d)
KEPT_POSITIONS = "kept_positions"  # (k,) int64, ascending, in the raster of the image's N tokens


class PrunedQwen2_5_VLProcessor(PruningProcessor, Qwen2_5_VLMultiModalProcessor):
    """The item of a pruned image keeps its grid, has no pixels, and holds embeddings and where they stand in the grid.

    The engine may have an image's keys and values at hand and still needs its positions: for items that a model of
    this kind has no need to encode, it keeps what stays on the CPU (``keep_on_cpu``).
    """

    architecture = ARCHITECTURE
    family = QWEN2_5_VL

    def pruned_item(self, embeds: torch.Tensor, features: VisualFeatures, plan: PruningPlan) -> PreparedImage:
        assert features.grid is not None
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return {
            "image_grid_thw": torch.tensor([1, *(merge * side for side in features.grid)]),
            NUM_KEPT: torch.tensor(len(embeds)),
            KEPT_EMBEDS: embeds,
            KEPT_POSITIONS: plan.kept.cpu(),
        }

    def kept_count(self, item: PreparedImage) -> int | None:
        return int(item[NUM_KEPT]) or None if NUM_KEPT in item else None

    def collate(self, items: Sequence[PreparedImage]) -> Mapping[str, Any]:
        """What each image lacks, pixels or embeddings, has no rows in their field."""
        pixels = [item["pixel_values"] for item in items if NUM_KEPT not in item]
        pruned = [item for item in items if NUM_KEPT in item]
        stock = {
            "pixel_values": torch.cat(pixels) if pixels else self._no_pixels,
            "image_grid_thw": torch.stack([item["image_grid_thw"] for item in items]),
        }
        if not pruned:
            return stock
        return {
            **stock,
            NUM_KEPT: torch.tensor([self.kept_count(item) or 0 for item in items]),
            KEPT_EMBEDS: torch.cat([item[KEPT_EMBEDS] for item in pruned]),
            KEPT_POSITIONS: torch.cat([item[KEPT_POSITIONS] for item in pruned]),
        }

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

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        num_kept = hf_inputs.get(NUM_KEPT)
        if num_kept is None:
            return fields
        patches = torch.where(num_kept > 0, 0, hf_inputs["image_grid_thw"].prod(dim=1))
        return {
            **fields,
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", patches),
            NUM_KEPT: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            KEPT_EMBEDS: MultiModalFieldConfig.flat_from_sizes("image", num_kept),
            KEPT_POSITIONS: MultiModalFieldConfig.flat_from_sizes("image", num_kept, keep_on_cpu=True),
        }

    @cached_property
    def _no_pixels(self) -> torch.Tensor:
        """(0, D), of the type that pixels have: the engine joins them with those of other requests."""
        blank = MultiModalDataItems({"image": ImageProcessorItems([Image.new("RGB", (56, 56))])})
        return self._apply_hf_processor_main(blank, {})["pixel_values"][:0].clone()

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
class PrunedQwen2_5_VLForConditionalGeneration(NotesLoads, Qwen2_5_VLForConditionalGeneration):
    """The stock model, which also accepts images that arrive as the embeddings of the tokens to keep."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.refuse_unsupported(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Embeddings of a batch of images or of videos, in order.

        Args:
            num_kept: (B,) how many embeddings each image comes with; 0 for one that comes in pixels. Without it, the
                others are the stock model's.
            kept_embeds: (sum of num_kept, d), image after image.
            kept_positions: not used here.
            pixel_values: (P, D) patches of the images that come in pixels.
            image_grid_thw: (B, 3) of all images.

        Returns:
            As the stock model for batches without num_kept; else one (tokens, d) tensor for each image.
        """
        num_kept, embeds = kwargs.pop(NUM_KEPT, None), kwargs.pop(KEPT_EMBEDS, None)
        kwargs.pop(KEPT_POSITIONS, None)
        if not isinstance(num_kept, torch.Tensor) or not isinstance(embeds, torch.Tensor):
            return super().embed_multimodal(**kwargs)
        counts = num_kept.tolist()
        kept = iter(torch.split(embeds, [count for count in counts if count]))
        if 0 not in counts:
            return list(kept)
        grids: Any = kwargs.pop("image_grid_thw")
        encoded = iter(super().embed_multimodal(**kwargs, image_grid_thw=grids[num_kept.cpu() == 0]))
        return [next(kept) if count else next(encoded) for count in counts]

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
    if feature.data is None or NUM_KEPT not in feature.data or int(_field(feature, NUM_KEPT)) == 0:
        return None
    return _field(feature, KEPT_POSITIONS)

"""Shared by models with native-resolution images and M-RoPE: Qwen-VL and GLM-V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vllm_vtprune.encoder import PlannedImage
from vllm_vtprune.features import Layout
from vllm_vtprune.lossless import distinct_tokens
from vllm_vtprune.plugin.family import DynamicResolution
from vllm_vtprune.plugin.items import KEPT_POSITIONS
from vllm_vtprune.plugin.limits import VIDEO_OPTIONS
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.selectors.method import Input

OPTIONS = VIDEO_OPTIONS | {"do_resize", "max_pixels", "min_pixels", "size"}
PROVIDES: frozenset[Input] = frozenset({"grid", "positions", "dynamic_resolution"})


def merge_size(config: Any) -> int:
    """Patches per token in either direction."""
    size: int = config.vision_config.spatial_merge_size
    return size


class GridProcessor(DynamicResolution, PruningProcessor):
    """Mixin: a pruned item also holds the image's grid and the indices of its kept tokens, on the CPU.

    The engine needs positions even for an image in the prefix cache; of such an item it keeps the CPU fields
    (``keep_on_cpu``).
    """

    def position_fields(self, image: PlannedImage | Layout, kept: torch.Tensor) -> Mapping[str, torch.Tensor]:
        assert image.grid is not None
        merge = merge_size(self.info.get_hf_config())
        grid = torch.tensor([1, *(merge * side for side in image.grid)])
        return {"image_grid_thw": grid, KEPT_POSITIONS: kept}

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        _, height, width = item["image_grid_thw"].data.tolist()
        merge = merge_size(self.info.get_hf_config())
        return Layout(height * width, grid=(height // merge, width // merge))

    def distinct_tokens(self, item: Mapping[str, Any]) -> tuple[int, ...]:
        return distinct_tokens(item["pixel_values"].data, merge_size(self.info.get_hf_config()))

    @property
    def token_side(self) -> int:
        vision = self.info.get_hf_config().vision_config
        side: int = vision.patch_size * vision.spatial_merge_size
        return side

    def num_tokens(self, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> int:
        unit = self.token_side
        height, width = size
        try:
            options = self._image_options(hf_kwargs)
            if options.get("do_resize", True):
                limits = dict(self.info.get_image_processor().size) | options.get("size", {})
                least = options.get("min_pixels", limits["shortest_edge"])
                most = options.get("max_pixels", limits["longest_edge"])
                height, width = self.resized(height, width, unit, least, most)
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"images cannot be resized with {dict(hf_kwargs)}: {error}") from error
        return (height // unit) * (width // unit)

    def resized(self, height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
        """Height and width, in pixels, to which the HF processor resizes an image.

        Args:
            height, width: size of the image, in pixels.
            unit: the result is a multiple of it.
            least, most: limits of the area, in pixels.

        Raises:
            ValueError: the image is too narrow.
        """
        scaled: tuple[int, int] = smart_resize(height, width, unit, least, most)
        return scaled

    def at_area(self, hf_kwargs: Mapping[str, object], area: int) -> Mapping[str, object]:
        """Override every size option of request and engine: ``images_kwargs`` take precedence."""
        size = {"shortest_edge": area, "longest_edge": area}
        options = self._image_options(hf_kwargs)
        limits = {name: area for name in ("min_pixels", "max_pixels") if name in options}
        image_options: Any = hf_kwargs.get("images_kwargs", {})
        return {**hf_kwargs, "images_kwargs": {**image_options, **limits, "size": size, "do_resize": True}}

    def _image_options(self, hf_kwargs: Mapping[str, object]) -> dict[str, Any]:
        """Image options of the request, then the engine; without the HF processor's defaults."""
        merged = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        return {**merged, **merged.get("images_kwargs", {})}


class QwenProcessor(GridProcessor):
    """`GridProcessor` for ChatML prompts."""

    turn = "<|im_start|>"

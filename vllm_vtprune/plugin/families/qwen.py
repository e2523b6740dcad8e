"""What processors have in common of models that take images at their own resolution, with positions of three numbers.

And those of Qwen's, which have ChatML turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vllm_vtprune.features import Layout, VisualFeatures
from vllm_vtprune.plugin.family import DynamicResolution
from vllm_vtprune.plugin.items import KEPT_POSITIONS
from vllm_vtprune.plugin.limits import VIDEO_OPTIONS
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.selectors.method import Input

OPTIONS = VIDEO_OPTIONS | {"do_resize", "max_pixels", "min_pixels", "size"}
PROVIDES: frozenset[Input] = frozenset({"grid", "positions", "dynamic_resolution"})


def merge_size(config: Any) -> int:
    """Patches of a token in either direction."""
    size: int = config.vision_config.spatial_merge_size
    return size


class GridProcessor(DynamicResolution, PruningProcessor):
    """Mixin: the item of a pruned image also holds its grid, and where the kept embeddings stand in it.

    The engine may have an image's keys and values at hand and still needs its positions: for items that a model of
    this kind has no need to encode, it keeps what stays on the CPU (``keep_on_cpu``).
    """

    def fields_of(self, features: VisualFeatures, kept: torch.Tensor) -> Mapping[str, torch.Tensor]:
        assert features.grid is not None
        merge = merge_size(self.info.get_hf_config())
        grid = torch.tensor([1, *(merge * side for side in features.grid)])
        return {"image_grid_thw": grid, KEPT_POSITIONS: kept}

    def in_raster(self, item: Mapping[str, Any], sources: torch.Tensor | None = None) -> Layout:
        """The layout of an image whose tokens are one raster; `sources` as of `Layout`."""
        _, height, width = item["image_grid_thw"].data.tolist()
        merge = merge_size(self.info.get_hf_config())
        return Layout(height * width, grid=(height // merge, width // merge), sources=sources)

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
                height, width = self.resized(height, width, unit, least, most)
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"an image cannot be scaled with {dict(hf_kwargs)}: {error}") from error
        return (height // unit) * (width // unit)

    def resized(self, height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
        """Height and width to which the HF processor scales an image: multiples of a unit, within limits of the area.

        Raises:
            ValueError: the image is too narrow.
        """
        scaled: tuple[int, int] = smart_resize(height, width, unit, least, most)
        return scaled

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


class QwenProcessor(GridProcessor):
    """Mixin: as `GridProcessor`, of a model with ChatML turns."""

    turn = "<|im_start|>"

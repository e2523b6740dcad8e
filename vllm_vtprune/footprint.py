"""How much of a GPU's memory a model's vision tower takes, from the shapes in its config: no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from vllm_vtprune.placement import Footprint
from vllm_vtprune.selectors.pivots import peak_bytes
from vllm_vtprune.towers import clip, internvl, llava_next, qwen2_5_vl

__all__ = ["footprint"]


@dataclass(frozen=True)
class _Family:
    """What the memory of a family's tower follows from, as functions of its config.

    Attributes:
        merged: patches of a token.
        columns: of the features beside the embeddings.
        forward: most patches of one forward, of an image of so many.
        build: encoder and projector, to count their parameters.
    """

    merged: Callable[[Any], int]
    columns: Callable[[Any], int]
    forward: Callable[[Any, int], int]
    build: Callable[[Any], nn.Module]


def _side(size: int | Sequence[int]) -> int:
    """Of a square, of which some configs give both sides."""
    return size if isinstance(size, int) else size[0]


def _square(vision: Any) -> int:
    """Patches of one square or tile, of an encoder of fixed size."""
    return (_side(vision.image_size) // _side(vision.patch_size)) ** 2


_CLIP = _Family(
    build=clip.build_module,
    merged=lambda config: 1,
    columns=lambda config: (len(clip.feature_depths(config)) + 1) * config.vision_config.hidden_size,
    forward=lambda config, patches: clip.SQUARES * _square(config.vision_config),
)
_FAMILIES = {  # architecture -> family
    "LlavaForConditionalGeneration": _CLIP,
    "LlavaNextForConditionalGeneration": replace(_CLIP, build=llava_next.build_module),
    "InternVLForConditionalGeneration": _Family(
        build=internvl.build_module,
        merged=lambda config: round(1 / config.downsample_ratio) ** 2,
        columns=lambda config: (round(1 / config.downsample_ratio) ** 2 + 1) * config.vision_config.hidden_size,
        forward=lambda config, patches: internvl.TILES * _square(config.vision_config),
    ),
    "Qwen2_5_VLForConditionalGeneration": _Family(
        build=qwen2_5_vl.build_module,
        merged=lambda config: config.vision_config.spatial_merge_size**2,
        columns=lambda config: 0,  # encoder and embeds are one tensor
        forward=lambda config, patches: max(patches, qwen2_5_vl.BATCH_PATCHES),
    ),
    "Qwen3VLForConditionalGeneration": _Family(
        merged=lambda config: config.vision_config.spatial_merge_size**2,
        columns=lambda config: (
            config.vision_config.hidden_size
            + len(config.vision_config.deepstack_visual_indexes) * config.text_config.hidden_size
        ),
        forward=lambda config, patches: max(patches, qwen2_5_vl.BATCH_PATCHES),
        build=lambda config: Qwen3VLVisionModel(config.vision_config),
    ),
}


def footprint(
    architecture: str, hf_config: Any, dtype: torch.dtype, *, tokens: int, batch: int, held: int
) -> Footprint:
    """The GPU memory of one API process, from shapes alone: no weights are read.

    Args:
        architecture: of the model, one of those that can be pruned.
        hf_config: the model's config.
        dtype: the model's.
        tokens: of the largest image that the image processor makes.
        batch: most images that are encoded together.
        held: bytes of features that stay on the GPU.

    Raises:
        TowerError: the config is not supported.
    """
    family = _FAMILIES[architecture]
    merged, width = family.merged(hf_config), hf_config.text_config.hidden_size
    patches = tokens * merged
    forward = min(batch * patches, family.forward(hf_config, patches))
    features = dtype.itemsize * tokens * (width + family.columns(hf_config))
    finished = batch * features * (1 - forward / (batch * patches))  # by the time of the last forward
    return Footprint(
        weights=_parameters(family.build, hf_config) * dtype.itemsize,
        encoding=forward * _patch_bytes(hf_config.vision_config, dtype) + ceil(finished),
        selection=features + peak_bytes(tokens, width, tokens),
        held=held,
    )


def _parameters(build: Callable[[Any], nn.Module], hf_config: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(hf_config).parameters())


def _patch_bytes(vision: Any, dtype: torch.dtype) -> int:
    """The most that a patch takes: its pixels, and it in a layer's feed-forward part, or rotated in float32.

    The factors are fitted to what torch allocates (tests/core/test_placement.py); attention is not materialised.
    """
    hidden, exact = vision.hidden_size, torch.float32.itemsize
    feed_forward = dtype.itemsize * (8 * hidden + 3.6 * vision.intermediate_size)
    rotation = hidden * (9 * dtype.itemsize + 6 * exact)
    values = 3 * _side(vision.patch_size) ** 2 * getattr(vision, "temporal_patch_size", 1)
    return ceil(max(feed_forward, rotation) + values * (dtype.itemsize + exact))

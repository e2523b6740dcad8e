"""Qwen2.5-VL: a vision transformer that attends in windows, at the image's own resolution, and merges 2 x 2 patches."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.towers.base import PixelNorm, TokenTable, VisionTower, random_table
from vllm_vtprune.towers.weights import CheckpointReader, TowerError, fill_random, load_into

__all__ = ["ALIASES", "Qwen2_5_VLTower", "build_module", "segments_by_length"]

TOKEN_TABLE = "language_model.embed_tokens.weight"

# Canonical names are those of `Qwen2_5_VLVision`. Stored ones, in order: released checkpoints, and the modules of
# transformers since 4.52. Where the embeddings are tied (3B), the one table is stored as the input's.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "visual.": ("visual.", "model.visual."),
    "language_model.embed_tokens.": ("model.embed_tokens.", "model.language_model.embed_tokens."),
}

ROTARY_BASE = 10_000.0

BATCH_PATCHES = 16_384
"""Most patches of one forward, or else one image: bounds its memory, which grows with them."""


class Qwen2_5_VLVision(nn.Module):
    """The parameters of the tower, named as in transformers' Qwen2_5_VLModel."""

    visual: Qwen2_5_VisionTransformerPretrainedModel


def build_module(config: Any) -> Qwen2_5_VLVision:
    """The encoder with its merger, on the meta device. Raises TowerError for a config not supported."""
    vision = config.vision_config
    if vision.out_hidden_size != config.text_config.hidden_size:
        raise TowerError(
            f"vision_config.out_hidden_size={vision.out_hidden_size} is not the language model's "
            f"hidden_size={config.text_config.hidden_size}"
        )
    module = Qwen2_5_VLVision()
    with torch.device("meta"):
        module.visual = Qwen2_5_VisionTransformerPretrainedModel(vision)
    del module.visual.rotary_pos_emb  # no weights, and other than in other releases of transformers; see `rotation`
    return module


def rotation(places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (P, head_dim) by which a patch's queries and keys are turned.

    `places`: (P, 2) row and column of each patch. A quarter of the head's dimensions turns with the row, the next with
    the column, and the other half once more like the first.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=places.device) / (head_dim // 2)
    angles = (places[:, :, None] * (1 / ROTARY_BASE**exponents)).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def segments_by_length(boundaries: Tensor) -> list[Tensor]:
    """The positions of consecutive segments of a sequence, those of equal length together.

    `boundaries`: (S + 1,) where they begin, and the end. Returns one (segments, length) tensor for each length.
    """
    starts, lengths = boundaries[:-1].long(), boundaries.long().diff()
    return [
        starts[lengths == length, None] + torch.arange(length, device=boundaries.device)
        for length in sorted(set(lengths.tolist()))
    ]


def attend(attention: Any, hidden: Tensor, segments: Sequence[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """What transformers' vision attention computes within segments, all segments of one length at a time.

    Its own loop runs once for each segment, and an image of 10,000 tokens has over 600 windows. `hidden`: (P, d_v),
    normed. `segments`: as `segments_by_length` gives them. `cos`, `sin`: (P, d_h) of `rotation`.
    """
    query, key, value = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, attention.head_dim)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    mixed = torch.empty_like(query)
    for positions in segments:
        q, k, v = (states[positions].transpose(1, 2) for states in (query, key, value))
        outputs = nn.functional.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
        mixed[positions] = outputs.transpose(1, 2)
    out: Tensor = attention.proj(mixed.flatten(1))
    return out


class Qwen2_5_VLTower(VisionTower):
    """The tower of Qwen2_5_VLForConditionalGeneration.

    `seed`: None reads `model_dir`; a number fills the tower with random weights instead. `pixel_norm`: where pixels
    come as they are in the image. Raises TowerError where the config is not supported or the files do not fit.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        hf_config: Any,
        dtype: torch.dtype,
        device: torch.device,
        seed: int | None,
        pixel_norm: PixelNorm | None = None,
    ) -> None:
        module = build_module(hf_config)
        shape = (hf_config.text_config.vocab_size, hf_config.text_config.hidden_size)
        if seed is None:
            reader = CheckpointReader(model_dir, ALIASES)
            reader.plan({TOKEN_TABLE: shape})
            load_into(module, reader, device=device, dtype=dtype)
            table = TokenTable(partial(reader.rows, TOKEN_TABLE), *shape)
        else:
            fill_random(module, device=device, dtype=dtype, seed=seed)
            table = random_table(*shape, seed)
        self._config = hf_config.vision_config
        self._visual = module.visual
        self._norm = None if pixel_norm is None else pixel_norm.on(device)
        self._patch = self._config.in_channels * self._config.temporal_patch_size * self._config.patch_size**2
        super().__init__(module, table, weights="checkpoint" if seed is None else "dummy")

    def blank(self) -> PreparedImage:
        side = 2 * self._config.window_size // self._config.patch_size
        dtype = torch.float32 if self._norm is None else torch.uint8
        pixels = torch.zeros(side * side, self._patch, dtype=dtype)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([1, side, side])}

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """As `VisionTower.encode`, for images with `image_grid_thw` (3,) = (1, h, w) and `pixel_values` (h * w, D).

        Patches stand as the image processor leaves them, the four of a token together; D counts the values of one.
        `encoder` and `embeds` are one tensor: the merger belongs to the encoder. Tokens are in raster order.
        """
        grids = [self._checked_grid(image) for image in images]
        found: list[VisualFeatures] = []
        for batch in batches([height * width for height, width in grids]):
            pixels = torch.cat([images[i]["pixel_values"].to(self.device) for i in batch])
            merged = self._forward(pixels, torch.tensor([[1, *grids[i]] for i in batch]))
            merge = self._config.spatial_merge_size
            sizes = [(grids[i][0] // merge, grids[i][1] // merge) for i in batch]
            for size, embeds in zip(
                sizes, torch.split(merged, [rows * columns for rows, columns in sizes]), strict=True
            ):
                own = embeds.clone()
                found.append(VisualFeatures(encoder=own, embeds=own, grid=size))
        return found

    def _checked_grid(self, image: PreparedImage) -> tuple[int, int]:
        """Rows and columns in patches."""
        frames, height, width = image["image_grid_thw"].tolist()
        expected = (height * width, self._patch)
        if frames != 1 or height % self._config.spatial_merge_size or width % self._config.spatial_merge_size:
            raise ValueError(
                f"image_grid_thw is {[frames, height, width]}; expected one frame and "
                f"multiples of {self._config.spatial_merge_size}"
            )
        if (shape := tuple(image["pixel_values"].shape)) != expected:
            raise ValueError(f"pixel_values have shape {shape}; expected {expected}")
        return height, width

    def _forward(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """(P, D) patches of B images with `grids` (B, 3) -> (P / 4, d) tokens, image by image in raster order."""
        visual, merge = self._visual, self._config.spatial_merge_size
        if self._norm is not None:
            pixels = self._norm(pixels)
        hidden = visual.patch_embed(pixels.to(self.dtype))
        order, window_ends = get_vision_window_index(grids, merge, self._config.window_size, self._config.patch_size)
        order = order.to(self.device)
        image_ends = nn.functional.pad(grids.prod(dim=1).cumsum(dim=0), (1, 0))
        windows, wholes = (
            [positions.to(self.device) for positions in segments_by_length(ends)] for ends in (window_ends, image_ends)
        )
        places = get_vision_position_ids(grids, merge).to(self.device)
        cos, sin = rotation(places, self._config.hidden_size // self._config.num_heads)
        hidden, cos, sin = (
            states.unflatten(0, (-1, merge * merge))[order].flatten(0, 1) for states in (hidden, cos, sin)
        )
        for depth, block in enumerate(visual.blocks):
            segments = wholes if depth in self._config.fullatt_block_indexes else windows
            hidden = hidden + attend(block.attn, block.norm1(hidden), segments, cos, sin)
            hidden = hidden + block.mlp(block.norm2(hidden))
        if hidden.dtype == torch.float16:  # the last layer's outliers overflow it; vLLM clips them too
            limit = torch.finfo(torch.float16).max - 1000
            hidden = hidden.clamp(-limit, limit)
        merged: Tensor = visual.merger(hidden)
        return merged[order.argsort()]


def batches(sizes: Sequence[int]) -> Iterator[range]:
    """Consecutive images that together stay within `BATCH_PATCHES`, or one that is larger alone."""
    begin, total = 0, 0
    for end, size in enumerate(sizes):
        if end > begin and total + size > BATCH_PATCHES:
            yield range(begin, end)
            begin, total = end, 0
        total += size
    if begin < len(sizes):
        yield range(begin, len(sizes))

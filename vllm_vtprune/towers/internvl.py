"""InternVL, in the layout of transformers: InternViT on tiles of the image, pixel shuffle, and a projector.

The image is scaled to a number of tiles, each of which is encoded by itself; where it is more than one, a thumbnail of
the whole image follows. Pixel shuffle puts blocks of 2 x 2 patches side by side, and the projector makes one token of
each block. What belongs to a patch is pooled over its block: CLS attention is added up (a token gets what its patches
get together), keys are averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector, InternVLVisionModel

from vllm_vtprune.features import PreparedImage, Tiles, VisualFeatures
from vllm_vtprune.towers.base import VisionTower, load_parameters
from vllm_vtprune.towers.weights import TowerError

__all__ = ["ALIASES", "TOKEN_TABLE", "InternVLTower", "attend", "build_module", "shuffled"]

TOKEN_TABLE = "language_model.embed_tokens.weight"

# Canonical names are those of `InternVLVision`. Stored ones, in order: released checkpoints, which are those that
# `save_pretrained` writes; the modules of transformers from 4.52 on.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "vision_tower.": ("vision_tower.", "model.vision_tower."),
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "language_model.embed_tokens.": (
        "language_model.model.embed_tokens.",
        "model.language_model.embed_tokens.",
        "language_model.embed_tokens.",
    ),
}

TILES = 16  # most tiles of one forward: bounds its memory


class InternVLVision(nn.Module):
    """The parameters of the tower, named as in transformers' InternVLModel."""

    vision_tower: InternVLVisionModel
    multi_modal_projector: InternVLMultiModalProjector


def build_module(config: Any) -> InternVLVision:
    """The encoder and the projector, on the meta device. Raises TowerError for a config not supported."""
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if layer != -1 or strategy != "default":  # vLLM 0.32 reads neither, and does as these say
        raise TowerError(
            f"vision_feature_layer={layer!r} with vision_feature_select_strategy={strategy!r} is not supported; "
            "supported: -1 with 'default'"
        )
    height, width = config.vision_config.image_size
    across = 1 / config.downsample_ratio
    side = height // config.vision_config.patch_size[0]
    if height != width or across != int(across) or side % int(across):
        raise TowerError(
            f"image_size={[height, width]} with downsample_ratio={config.downsample_ratio} is not supported; expected "
            "a square whose patches form whole blocks"
        )
    vision_config = config.vision_config.__class__.from_dict(config.vision_config.to_dict())
    vision_config._attn_implementation = "sdpa"
    module = InternVLVision()
    with torch.device("meta"):
        module.vision_tower = InternVLVisionModel(vision_config)
        module.multi_modal_projector = InternVLMultiModalProjector(config)
    return module


def attend(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One InternViT layer that also returns what the CLS token attends to, without the N x N attention map.

    `hidden`: (B, 1 + N, d_v). Returns the layer's output, of that shape; the CLS token's attention to the N patches,
    (B, N) in float32, mean over heads of a softmax over all 1 + N tokens; and the patches' keys, (B, heads, N, d_h).
    """
    attention = layer.attention
    normed = layer.layernorm_before(hidden)
    query, key, value = (
        projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for projected in (
            attention.q_norm(attention.q_proj(normed)),
            attention.k_norm(attention.k_proj(normed)),
            attention.v_proj(normed),
        )
    )
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    hidden = hidden + layer.lambda_1 * attention.projection_layer(mixed.transpose(1, 2).flatten(2))
    hidden = hidden + layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden))

    scores = (key.float() @ query[:, :, 0, :, None].float()).squeeze(-1) * attention.scale  # (B, heads, 1 + N)
    return hidden, scores.softmax(dim=-1).mean(dim=1)[:, 1:], key[:, :, 1:]


def shuffled(patches: Tensor, across: int) -> Tensor:
    """(B, N, d) in raster order of a square -> (B, N / across^2, across^2, d): blocks in raster order, and in each its
    patches in raster order.
    """
    batch, count, width = patches.shape
    blocks = round(count**0.5) // across
    grid = patches.view(batch, blocks, across, blocks, across, width)
    return grid.transpose(2, 3).reshape(batch, blocks * blocks, across * across, width)


@dataclass(frozen=True, eq=False)
class Seen:
    """What the encoder and the projector make of S tiles of N tokens: fields as in `VisualFeatures`, (S, N, ...)."""

    encoder: Tensor
    embeds: Tensor
    cls_attention: Tensor
    early_attention: Tensor
    keys: Tensor


class InternVLTower(VisionTower):
    """The tower of InternVLForConditionalGeneration.

    `seed`: None reads `model_dir`; a number fills the tower with random weights instead. Raises TowerError where the
    config is not supported or the files do not fit.
    """

    def __init__(
        self, model_dir: Path, *, hf_config: Any, dtype: torch.dtype, device: torch.device, seed: int | None
    ) -> None:
        module = build_module(hf_config)
        table = load_parameters(
            module, model_dir, hf_config, table=TOKEN_TABLE, aliases=ALIASES, dtype=dtype, device=device, seed=seed
        )
        self._vision = module.vision_tower
        self._projector = module.multi_modal_projector
        self._across = int(1 / hf_config.downsample_ratio)
        self._image_size: int = hf_config.vision_config.image_size[0]  # pixels
        self._side = self._image_size // hf_config.vision_config.patch_size[0] // self._across  # tokens
        super().__init__(module, table, weights="checkpoint" if seed is None else "dummy")

    def blank(self) -> PreparedImage:
        pixels = torch.zeros(1, 3, self._image_size, self._image_size)
        return {"pixel_values": pixels, "tile_grid": torch.tensor([1, 1])}

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """As `VisionTower.encode`, for images in tiles.

        `pixel_values`: (tiles, 3, S, S), the thumbnail last. `tile_grid`: (2,) rows and columns of the others.

        `encoder`: the blocks of patches that feed the projector. `cls_attention`, `keys`: of the last layer, mean over
        heads, pooled over blocks; each tile's attention is its own. `overview_attention`: the thumbnail's, of the first
        layer.
        """
        size = self._image_size
        for image in images:
            rows, columns = image["tile_grid"].tolist()
            expected = (rows * columns + (rows * columns > 1), 3, size, size)
            if (shape := tuple(image["pixel_values"].shape)) != expected:
                raise ValueError(f"pixel_values have shape {shape}; expected {expected}")
        if not images:
            return []

        seen = self._see(torch.cat([image["pixel_values"] for image in images]))
        features, first = [], 0
        for image in images:
            rows, columns = image["tile_grid"].tolist()
            features.append(self._features(seen, first, rows, columns))
            first += len(image["pixel_values"])
        return features

    def _see(self, pixels: Tensor) -> Seen:
        parts = [self._forward(some) for some in torch.split(pixels, TILES)]
        names = ("encoder", "embeds", "cls_attention", "early_attention", "keys")
        return Seen(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def _forward(self, pixels: Tensor) -> Seen:
        hidden = self._vision.embeddings(pixels.to(self.device, self.dtype))
        layers = self._vision.encoder.layer
        hidden, early, keys = attend(layers[0], hidden)
        attention = early
        for layer in layers[1:-1]:
            hidden = layer(hidden)
        if len(layers) > 1:
            hidden, attention, keys = attend(layers[-1], hidden)
        encoder = shuffled(self._vision.layernorm(hidden)[:, 1:], self._across).flatten(2)
        return Seen(
            encoder=encoder,
            embeds=self._projector(encoder),
            cls_attention=shuffled(attention[..., None], self._across).sum(dim=(2, 3)),
            early_attention=shuffled(early[..., None], self._across).sum(dim=(2, 3)),
            keys=shuffled(keys.mean(dim=1), self._across).mean(dim=2),
        )

    def _features(self, seen: Seen, first: int, rows: int, columns: int) -> VisualFeatures:
        """Those of one image, whose tiles begin at `first`."""
        grid, count = (self._side, self._side), rows * columns
        total = count + 1 if count > 1 else 1

        def own(values: Tensor) -> Tensor:
            return values[first : first + total].flatten(0, 1).clone()

        boxes = [
            (row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
            for row in range(rows)
            for column in range(columns)
        ]
        tiles = Tiles(
            ids=torch.arange(total, device=self.device).repeat_interleave(self._side**2),
            grids=(grid,) * total,
            boxes=(*boxes, None),
        )
        return VisualFeatures(
            encoder=own(seen.encoder),
            embeds=own(seen.embeds),
            grid=None if count > 1 else grid,
            tiles=tiles if count > 1 else None,
            cls_attention=own(seen.cls_attention),
            overview_attention=seen.early_attention[first + count].clone() if count > 1 else None,
            keys=own(seen.keys),
        )

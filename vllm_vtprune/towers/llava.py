"""LLaVA-1.5: a CLIP vision transformer and a two-layer projector."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.towers.base import TokenTable, VisionTower, random_table
from vllm_vtprune.towers.weights import CheckpointReader, TowerError, fill_random, load_into

__all__ = ["ALIASES", "LlavaTower", "build_module", "feature_depths"]

TOKEN_TABLE = "language_model.embed_tokens.weight"

# Canonical names are those of `LlavaVision`. Stored ones, in order: released checkpoints, which vLLM 0.32 reads; the
# modules of transformers 4.52 and of 5, whose CLIP has no inner `vision_model`; what `save_pretrained` of 5 writes.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "vision_tower.": (
        "vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "vision_tower.",
    ),
    "multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "language_model.embed_tokens.": (
        "language_model.model.embed_tokens.",
        "model.language_model.embed_tokens.",
        "language_model.embed_tokens.",
    ),
}


def feature_depths(config: Any) -> list[int]:
    """How many encoder layers each selected hidden state has behind it: [23] for -2 of 24 layers.

    `config.vision_feature_layer` is an index, or a list of them, into the encoder's hidden states: the embeddings, then
    each layer's output. Raises TowerError for one that is not there.
    """
    layer, states = config.vision_feature_layer, config.vision_config.num_hidden_layers + 1
    selected = [layer] if isinstance(layer, int) else list(layer)
    if not selected or not all(-states <= index < states for index in selected):
        raise TowerError(f"vision_feature_layer={layer!r} is not valid: expected indices in {-states} to {states - 1}")
    return [index % states for index in selected]


class LlavaVision(nn.Module):
    """The parameters of the tower, named as in transformers' LlavaModel."""

    vision_tower: CLIPVisionModel
    multi_modal_projector: LlavaMultiModalProjector


def build_module(config: Any) -> LlavaVision:
    """The encoder up to the deepest selected layer, and the projector, on the meta device.

    LLaVA never applies the encoder's final norm, so it is left out. Raises TowerError for a config not supported.
    """
    if config.vision_config.model_type != "clip_vision_model":
        raise TowerError(
            f"LLaVA with vision encoder {config.vision_config.model_type!r} is not supported; "
            "supported: clip_vision_model"
        )
    if config.vision_feature_select_strategy != "default":
        raise TowerError(  # "full" puts the CLS token among the patches, where it has no place in the token grid
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported; "
            "supported: 'default'"
        )
    vision_config = config.vision_config.__class__.from_dict(
        config.vision_config.to_dict() | {"num_hidden_layers": max(feature_depths(config))}
    )
    vision_config._attn_implementation = "sdpa"
    module = LlavaVision()
    with torch.device("meta"):
        module.vision_tower = CLIPVisionModel(vision_config)
        module.multi_modal_projector = LlavaMultiModalProjector(config)
    del module.vision_tower.post_layernorm
    return module


def attend(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One CLIP encoder layer that also returns what the CLS token attends to, without the N x N attention map.

    `hidden`: (B, 1 + N, d_v). Returns the layer's output, of that shape; the CLS token's attention to the N patches,
    (B, N) in float32, mean over heads of a softmax over all 1 + N tokens; and the patches' keys, (B, heads, N, d_h).
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    query, key, value = (
        project(normed).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    hidden = hidden + layer.mlp(layer.layer_norm2(hidden))

    scores = (key.float() @ query[:, :, 0, :, None].float()).squeeze(-1) * attention.scale  # (B, heads, 1 + N)
    return hidden, scores.softmax(dim=-1).mean(dim=1)[:, 1:], key[:, :, 1:]


class LlavaTower(VisionTower):
    """The tower of LlavaForConditionalGeneration with a CLIP encoder.

    `seed`: None reads `model_dir`; a number fills the tower with random weights instead. Raises TowerError where the
    config is not supported or the files do not fit.
    """

    def __init__(
        self, model_dir: Path, *, hf_config: Any, dtype: torch.dtype, device: torch.device, seed: int | None
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
        embeddings = module.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]  # not in checkpoints
        self._vision = module.vision_tower
        self._projector = module.multi_modal_projector
        self._depths = feature_depths(hf_config)
        self._image_size = embeddings.image_size  # pixels
        self._side = embeddings.image_size // embeddings.patch_size  # tokens
        super().__init__(module, table, weights="checkpoint" if seed is None else "dummy")

    def warm_up(self) -> None:
        self.encode([{"pixel_values": torch.zeros(3, self._image_size, self._image_size)}])

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """As `VisionTower.encode`, for images whose `pixel_values` are (3, S, S), with S the encoder's image size.

        `encoder`: the hidden states that the config selects, side by side where it selects several, without CLS.
        `cls_attention`, `keys`: of the layer that computes the deepest of them, mean over heads, the former in float32;
        None where that is no layer at all (the embeddings).
        """
        size = self._image_size
        for image in images:
            if (shape := tuple(image["pixel_values"].shape)) != (3, size, size):
                raise ValueError(f"pixel_values have shape {shape}; expected (3, {size}, {size})")
        if not images:
            return []

        pixel_values = torch.stack([image["pixel_values"] for image in images])
        hidden = self._vision.pre_layrnorm(self._vision.embeddings(pixel_values.to(self.device, self.dtype)))
        states, cls_attention, keys = {0: hidden}, None, None
        for depth, layer in enumerate(self._vision.encoder.layers, start=1):
            if depth < max(self._depths):
                hidden = layer(hidden, attention_mask=None)
            else:
                hidden, cls_attention, keys = attend(layer, hidden)
                keys = keys.mean(dim=1)
            if depth in self._depths:
                states[depth] = hidden
        encoder = torch.cat([states[depth][:, 1:] for depth in self._depths], dim=-1)
        embeds = self._projector(encoder)
        return [
            VisualFeatures(
                encoder=encoder[i].clone(),
                embeds=embeds[i].clone(),
                grid=(self._side, self._side),
                cls_attention=None if cls_attention is None else cls_attention[i].clone(),
                keys=None if keys is None else keys[i].clone(),
            )
            for i in range(len(pixel_values))
        ]

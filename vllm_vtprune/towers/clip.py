"""What models with a CLIP encoder and a two-layer projector share: LLaVA-1.5 and LLaVA-NeXT."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vllm_vtprune.towers.base import VisionTower, load_parameters
from vllm_vtprune.towers.weights import TowerError

__all__ = ["ALIASES", "TOKEN_TABLE", "ClipTower", "ClipVision", "Seen", "attend", "build_module", "feature_depths"]

TOKEN_TABLE = "language_model.embed_tokens.weight"

# Canonical names are those of `ClipVision`. Stored ones, in order: released checkpoints, which vLLM 0.32 reads; the
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

SQUARES = 16  # most squares of one forward: bounds its memory, at about 100 MB for each in CLIP-L/336


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


class ClipVision(nn.Module):
    """The parameters of the tower, named as in transformers' LlavaModel and LlavaNextModel."""

    vision_tower: CLIPVisionModel
    multi_modal_projector: LlavaMultiModalProjector


def build_module(config: Any) -> ClipVision:
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
    module = ClipVision()
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


@dataclass(frozen=True, eq=False)
class Seen:
    """What the encoder and the projector make of S squares of N patches each, CLS removed.

    Attributes:
        encoder: (S, N, d_v) the hidden states that the config selects, side by side where it selects several.
        embeds: (S, N, d) after the projector.
        cls_attention, keys: (S, N) in float32 and (S, N, d_h), of the layer that computes the deepest of those states,
            mean over heads; None where that is no layer at all (the embeddings).
        early_attention: (S, N) as `cls_attention`, of the first layer; None where it was not asked for.
    """

    encoder: Tensor
    embeds: Tensor
    cls_attention: Tensor | None
    keys: Tensor | None
    early_attention: Tensor | None = None


class ClipTower(VisionTower):
    """A tower with a CLIP encoder.

    `aliases`: as `CheckpointReader` takes them. `seed`: None reads `model_dir`; a number fills the tower with random
    weights instead. Raises TowerError where the config is not supported or the files do not fit.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        hf_config: Any,
        module: ClipVision,
        aliases: Mapping[str, tuple[str, ...]],
        dtype: torch.dtype,
        device: torch.device,
        seed: int | None,
    ) -> None:
        table = load_parameters(
            module, model_dir, hf_config, table=TOKEN_TABLE, aliases=aliases, dtype=dtype, device=device, seed=seed
        )
        embeddings = module.vision_tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]  # not in checkpoints
        self._vision = module.vision_tower
        self._projector = module.multi_modal_projector
        self._depths = feature_depths(hf_config)
        self._image_size: int = embeddings.image_size  # pixels
        self._side: int = embeddings.image_size // embeddings.patch_size  # tokens
        super().__init__(module, table, weights="checkpoint" if seed is None else "dummy")

    def see(self, pixels: Tensor, *, early: bool = False) -> Seen:
        """Encode S squares. `pixels`: (S, 3, size, size). `early`: read the first layer's attention too."""
        parts = [self._forward(some, early) for some in torch.split(pixels, SQUARES)]
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Tensor | None:
            return None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])

        encoder, embeds = (torch.cat([getattr(part, name) for part in parts]) for name in ("encoder", "embeds"))
        return Seen(encoder, embeds, joined("cls_attention"), joined("keys"), joined("early_attention"))

    def _forward(self, pixels: Tensor, early: bool) -> Seen:
        hidden = self._vision.pre_layrnorm(self._vision.embeddings(pixels.to(self.device, self.dtype)))
        states, attention, keys, first = {0: hidden}, None, None, None
        for depth, layer in enumerate(self._vision.encoder.layers, start=1):
            if depth == max(self._depths) or (early and depth == 1):
                hidden, attention, keys = attend(layer, hidden)
                first = attention if depth == 1 else first
            else:
                hidden = layer(hidden, attention_mask=None)
            if depth in self._depths:
                states[depth] = hidden
        encoder = torch.cat([states[depth][:, 1:] for depth in self._depths], dim=-1)
        return Seen(
            encoder,
            self._projector(encoder),
            cls_attention=attention,
            keys=None if keys is None else keys.mean(dim=1),
            early_attention=first if early else None,
        )

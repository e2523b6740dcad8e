"""Shared by LLaVA models, whose encoder is CLIP or SigLIP."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, SiglipVisionConfig

LAYERS = "vision_tower.vision_model.encoder.layers"
ATTENTION = (f"{LAYERS}.0.self_attn.attn", f"{LAYERS}.-1.self_attn.attn")


def has_clip(config: Any) -> bool:
    """Whether a LLaVA model's encoder is CLIP, not Pixtral or SigLIP."""
    return isinstance(config.vision_config, CLIPVisionConfig) and config.vision_feature_select_strategy == "default"


def has_siglip(config: Any) -> bool:
    """Whether a LLaVA model's encoder is SigLIP (no CLS token) and all of its patches are used."""
    return isinstance(config.vision_config, SiglipVisionConfig) and config.vision_feature_select_strategy == "full"


def side(config: Any) -> int:
    """Patches per side of the encoder's square input."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size)

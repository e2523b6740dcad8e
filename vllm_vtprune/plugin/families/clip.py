"""What the models of LLaVA's kind have in common, with an encoder of CLIP or SigLIP."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, SiglipVisionConfig

LAYERS = "vision_tower.vision_model.encoder.layers"
ATTENTION = (f"{LAYERS}.0.self_attn.attn", f"{LAYERS}.-1.self_attn.attn")


def has_clip(config: Any) -> bool:
    """Whether a model of these architectures has CLIP's encoder, and not that of Pixtral or SigLIP."""
    return isinstance(config.vision_config, CLIPVisionConfig) and config.vision_feature_select_strategy == "default"


def has_siglip(config: Any) -> bool:
    """Whether it has SigLIP's encoder, without a CLS token, and all of its patches."""
    return isinstance(config.vision_config, SiglipVisionConfig) and config.vision_feature_select_strategy == "full"


def side(config: Any) -> int:
    """Tokens of a square's side."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size)

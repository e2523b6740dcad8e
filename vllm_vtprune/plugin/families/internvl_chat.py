"""InternVL in its authors' layout (``InternVLChatModel``), whose config needs ``trust_remote_code``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import InternVLConfig, InternVLVisionConfig
from vllm.model_executor.models.internvl import InternVLChatModel, InternVLMultiModalProcessor
from vllm.transformers_utils.processors.internvl import calculate_internvl_targets

from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.families.internvl import PrunedInternVLProcessor, merge_size, tiled
from vllm_vtprune.plugin.family import parameters_in_transformers
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.processor import PruningProcessor

LAYERS = "vision_model.encoder.layers"
MEDIA = re.compile("<(?:image|video)>")
"""Media in the text of a prompt; not special tokens."""


def parameters(config: Any) -> int:
    """Parameter count of encoder and connector, from the same model in transformers' layout."""
    vision = config.vision_config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return parameters_in_transformers(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                attention_bias=vision.qkv_bias,
                use_qk_norm=vision.qk_normalization,
                norm_type=vision.norm_type,
                **{name: getattr(vision, name) for name in same},
            ),
            text_config={"model_type": "qwen2", "hidden_size": config.text_config.hidden_size},
            downsample_ratio=config.downsample_ratio,
        )
    )


class PrunedInternVLChatProcessor(PruningProcessor, InternVLMultiModalProcessor):
    """Like InternVL's; ``<image>`` in a prompt's text is replaced by the image."""

    turn = "<|im_start|>"
    family = replace(
        PrunedInternVLProcessor.family,
        name="internvl_chat",
        connector="mlp1",
        attention=(f"{LAYERS}.0.attn.attn", f"{LAYERS}.-1.attn.attn"),
        options=frozenset({"dynamic_image_size", "max_dynamic_patch", "min_dynamic_patch"}),  # no video options
        parameters=parameters,
    )

    @classmethod
    def prunes(cls, config: Any) -> bool:
        """False for the first version of pixel shuffle, which swaps rows and columns."""
        return bool(config.ps_version != "v1")

    def layout(self, item: Mapping[str, Any], size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        config = self.info.get_hf_config()
        processor = self.info.get_hf_processor(**hf_kwargs)
        height, width = size
        side = processor.image_processor.image_size
        _, columns, rows = calculate_internvl_targets(
            orig_width=width,
            orig_height=height,
            target_ratios=processor.resolve_target_ratios(use_thumbnail=False),
            image_size=side,
            use_thumbnail=False,
        )
        return tiled(
            rows // side,
            columns // side,
            patches=side // config.vision_config.patch_size,
            merge=merge_size(config),
            thumbnail=processor.image_processor.use_thumbnail,
        )

    def prompt_text(self, prompt: list[int]) -> str:
        return MEDIA.sub(" ", super().prompt_text(prompt))


@processed_by(PrunedInternVLChatProcessor)
class PrunedInternVLChatModel(PrunedModel, InternVLChatModel):
    """InternVL with pruned images."""

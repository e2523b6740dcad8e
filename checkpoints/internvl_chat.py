"""InternVL checkpoints made on the spot in the layout of their authors, like `OpenGVLab/InternVL3-1B`.

The weights are those of `write_internvl_checkpoint` with the same size and seed, under other names and with the
queries, keys and values of a vision layer in one tensor. transformers has no classes for this layout: vLLM reads the
configuration by code that lies in the checkpoint, which takes ``trust_remote_code``, and processes images itself.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, InternVLForConditionalGeneration

from vllm_vtprune_checkpoints.chatml import END, END_OF_TEXT, START, chat_template, chatml_tokenizer
from vllm_vtprune_checkpoints.internvl import ACROSS, PATCH_SIZE, Size, internvl_config
from vllm_vtprune_checkpoints.llava import TRAINED_TOKENS, DType, random_weight
from vllm_vtprune_checkpoints.weights import write_weights

IMAGE_SIZE: dict[Size, int] = {"tiny": 112, "1b": 448}
"""Pixels of a tile's side."""

SPECIAL_TOKENS = (END_OF_TEXT, START, END, "<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>")
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}

RENAMES = (  # patterns of transformers' names, and what stands for them in the files
    (r"^model\.vision_tower\.", "vision_model."),
    (r"\.cls_token$", ".class_embedding"),
    (r"\.position_embeddings$", ".position_embedding"),
    (r"\.patch_embeddings\.projection\.", ".patch_embedding."),
    (r"\.encoder\.layer\.", ".encoder.layers."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.([qk])_norm\.", r".attn.\1_norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"^model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)

CONFIGURATION = '''\
"""The configuration of InternVL, for readers that run the code of a checkpoint."""

from transformers import AutoConfig, PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **others):
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = AutoConfig.for_model(**(llm_config or {"model_type": "qwen2"}))
        super().__init__(**others)
'''


def write_internvl_chat_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    weights: bool = True,
    qk_norm: bool = False,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write an InternVL checkpoint in its authors' layout into `directory` and return its path.

    Args:
        size: "tiny" (2 million parameters, 16 tokens a tile) or "1b" (the shapes of InternVL3-1B).
        weights, qk_norm, seed, shards, dtype: as for `write_internvl_checkpoint`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(internvl_chat_config(size, dtype, qk_norm=qk_norm), indent=2))
    (directory / "configuration_internvl_chat.py").write_text(CONFIGURATION)
    ends = [TOKEN_ID[END], TOKEN_ID[END_OF_TEXT]]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(directory)
    tokenizer = chatml_tokenizer(SPECIAL_TOKENS, max_length=12_288)
    tokenizer.chat_template = chat_template(image="<image>\\n", video="<video>\\n")
    tokenizer.save_pretrained(directory)
    if weights:
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(internvl_config(size, IMAGE_SIZE[size], dtype, qk_norm=qk_norm))
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        parts: dict[str, list[str]] = {}
        for name in shapes:  # queries, keys and values come in this order
            parts.setdefault(_released(name), []).append(name)
        write_weights(
            directory,
            {name: (len(of) * shapes[of[0]][0], *shapes[of[0]][1:]) for name, of in parts.items()},
            rename=str,
            weight=lambda name, _: torch.cat([random_weight(part, shapes[part], seed) for part in parts[name]]),
            shards=shards,
            dtype=getattr(torch, dtype),
        )
    return directory


def internvl_chat_config(size: Size, dtype: DType = "float32", *, qk_norm: bool = False) -> dict[str, Any]:
    """What config.json holds for a size; `qk_norm` as for `write_internvl_checkpoint`."""
    image_size = IMAGE_SIZE[size]
    config = internvl_config(size, image_size, dtype, qk_norm=qk_norm)
    vision = config.vision_config
    alike = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type", "hidden_act")
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "vision_config": {
            "model_type": "intern_vit_6b",
            "architectures": ["InternVisionModel"],
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
            "num_channels": 3,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "layer_norm_eps": vision.layer_norm_eps,
            "initializer_factor": 0.1,
            **{name: getattr(vision, name) for name in alike},
        },
        "llm_config": {**config.text_config.to_dict(), "architectures": ["Qwen2ForCausalLM"]},
        "select_layer": -1,
        "force_image_size": image_size,
        "downsample_ratio": 1 / ACROSS,
        "ps_version": "v2",
        "template": "internvl2_5",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def _released(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name

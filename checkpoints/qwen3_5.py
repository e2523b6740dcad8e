"""Qwen3.5 checkpoints made on the spot, like those of Qwen3-VL in `qwen3_vl`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: three layers of linear attention
(Gated DeltaNet) to one of full attention with gates, positions of three numbers that turn a quarter of each head, and
the encoder of Qwen3-VL without DeepStack; "tiny-moe" has experts in every layer besides. "9b" has the shapes of
Qwen3.5-9B for vLLM's `load_format="dummy"`; only its token ids are those of our tokenizer. The directories are laid out
like `Qwen/Qwen3.5-9B`, but for the layer that predicts a second token (`mtp`), which stays away.

vLLM computes linear attention on CPUs in bfloat16 alone, so this is what is written unless another is asked for.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from vllm_vtprune_checkpoints.chatml import END_OF_TEXT, chat_template
from vllm_vtprune_checkpoints.llava import DType
from vllm_vtprune_checkpoints.qwen2_5_vl import PLACEHOLDERS, SPECIAL_TOKENS, TOKEN_ID
from vllm_vtprune_checkpoints.qwen3_vl import random_weight, write_qwen3_checkpoint
from vllm_vtprune_checkpoints.weights import Shape, noise

Size = Literal["tiny", "tiny-moe", "9b"]

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4, num_position_embeddings=24 * 24),
    "9b": dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, num_position_embeddings=48 * 48),
}
VISION["tiny-moe"] = VISION["tiny"]
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=256,  # so that 32 tokens take more space than a state of linear attention: vLLM's least block
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=64,  # vLLM's kernel for CPUs takes 64 and 128
        linear_value_head_dim=64,
        vocab_size=2304,
        max_position_embeddings=32_768,
    ),
    "9b": dict(
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        vocab_size=248_320,
        max_position_embeddings=262_144,
    ),
}
TEXT["tiny-moe"] = TEXT["tiny"] | dict(
    moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=8, num_experts_per_tok=2
)
_THINKING = """\
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- else -%}
        {{- '<think>\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def write_qwen3_5_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "bfloat16",
) -> Path:
    """Write a Qwen3.5 checkpoint into `directory` and return its path.

    Args:
        size: "tiny" and "tiny-moe" (5 and 6 million parameters) or "9b" (the shapes of Qwen3.5-9B).
        weights: without, everything but the weights, for `load_format="dummy"`.
        seed: each tensor depends on this and on its name, so shards hold the same numbers.
        shards: number of weight files; more than one come with an index.
        dtype: of the weights, and the one that the configuration announces.
    """
    return write_qwen3_checkpoint(
        Path(directory),
        Qwen3_5MoeForConditionalGeneration if size == "tiny-moe" else Qwen3_5ForConditionalGeneration,
        qwen3_5_config(size, dtype),
        template=chat_template(**PLACEHOLDERS).removesuffix("{%- endif -%}\n") + _THINKING,
        tiny=size.startswith("tiny"),
        weight=lambda name, shape: _random_weight(name, shape, seed),
        special_tokens=(*SPECIAL_TOKENS, "<think>", "</think>"),
        weights=weights,
        shards=shards,
    )


def qwen3_5_config(size: Size, dtype: DType = "bfloat16") -> Qwen3_5Config | Qwen3_5MoeConfig:
    """The configuration of Qwen3.5 in a size."""
    experts = "num_experts" in TEXT[size]
    return (Qwen3_5MoeConfig if experts else Qwen3_5Config)(
        architectures=[f"Qwen3_5{'Moe' if experts else ''}ForConditionalGeneration"],
        vision_config=dict(
            out_hidden_size=TEXT[size]["hidden_size"], patch_size=16, deepstack_visual_indexes=[], **VISION[size]
        ),
        text_config=dict(
            full_attention_interval=4,
            mamba_ssm_dtype="float32",  # of the states of linear attention
            rope_parameters=dict(
                rope_type="default",
                rope_theta=1e7,
                partial_rotary_factor=0.25,
                mrope_section=[11, 11, 10],  # of half of what is turned of a head
                mrope_interleaved=True,
            ),
            eos_token_id=TOKEN_ID[END_OF_TEXT],
            tie_word_embeddings=False,
            **TEXT[size],
        ),
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _random_weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """As for Qwen3-VL, but an image stays in the states of linear attention, and positions matter beyond bfloat16."""
    values = noise(name, shape, seed)
    if name.endswith(".A_log"):
        return values.sub_(4.0)  # a token takes exp(A_log) * softplus(a + dt_bias) from the logarithm of a state
    if name.endswith(".dt_bias"):
        return values.mul_(0.1)
    if "layernorm" in name or name.endswith("language_model.norm.weight"):
        return values.mul_(0.1)  # these norms add 1 to their weights; those of queries and keys do too, and are large
    if ".conv1d." in name or ".experts." in name:
        return values.mul_(1 / math.sqrt(shape[-1]))
    return random_weight(name, shape, seed)

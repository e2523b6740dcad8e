"""Qwen3.5 checkpoints, laid out like `Qwen/Qwen3.5-9B`, but without the layer that predicts a second token (`mtp`).

Three layers of linear attention (Gated DeltaNet) to one of full attention with gates, positions of three numbers that
turn a quarter of each head, and the encoder of Qwen3-VL without DeepStack.

vLLM computes linear attention on CPUs in bfloat16 alone, so this is what is written unless another is asked for.
"""

import math
from typing import Any

import torch
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from vllm_vtprune_checkpoints.qwen2_5_vl import PLACEHOLDERS, SPECIAL_TOKENS, TOKEN_ID, VISION_IDS, blocks
from vllm_vtprune_checkpoints.qwen3_vl import qwen3_processor, qwen3_weight
from vllm_vtprune_checkpoints.tokens import END_OF_TEXT, chatml_template
from vllm_vtprune_checkpoints.writing import Checkpoint, Shape, Writer, noise, widths

VISION = {
    "tiny": blocks(128, 256, 4, 4, num_position_embeddings=24 * 24),
    "9b": blocks(1152, 4304, 27, 16, num_position_embeddings=48 * 48),
}
TEXT = {  # tiny heads are so large that 32 tokens take more space than a state of linear attention: vLLM's least block
    "tiny": widths(256, 512, 4, 4, 2, 2304, 32_768, linear_num_key_heads=1, linear_num_value_heads=2),
    "9b": widths(4096, 12_288, 32, 16, 4, 248_320, 262_144, linear_num_key_heads=16, linear_num_value_heads=32),
}
LINEAR_HEAD_DIM = {"tiny": 64, "9b": 128}  # vLLM's kernel for CPUs takes 64 and 128
EXPERTS = dict(moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=8, num_experts_per_tok=2)
_THINKING = """\
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- else -%}
        {{- '<think>\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def qwen3_5(size: str) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        size: "tiny" and "tiny-moe" (5 and 6 million parameters; the latter has experts in every layer) or "9b" (the
            shapes of Qwen3.5-9B).
    """
    moe, size = size == "tiny-moe", size.removesuffix("-moe")
    text: dict[str, Any] = TEXT[size] | (EXPERTS if moe else {})
    config = (Qwen3_5MoeConfig if moe else Qwen3_5Config)(
        vision_config=dict(
            out_hidden_size=text["hidden_size"], patch_size=16, deepstack_visual_indexes=[], **VISION[size]
        ),
        text_config=dict(
            head_dim=256,
            linear_key_head_dim=LINEAR_HEAD_DIM[size],
            linear_value_head_dim=LINEAR_HEAD_DIM[size],
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
            **text,
        ),
        tie_word_embeddings=False,
        **VISION_IDS,
    )
    template = chatml_template(**PLACEHOLDERS).removesuffix("{%- endif -%}\n") + _THINKING
    return Checkpoint(
        Qwen3_5MoeForConditionalGeneration if moe else Qwen3_5ForConditionalGeneration,
        config,
        qwen3_processor(template, tiny=size == "tiny", special_tokens=(*SPECIAL_TOKENS, "<think>", "</think>")),
        weight=_weight,
        ends=[END_OF_TEXT],
    )


def _weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
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
    return qwen3_weight(name, shape, seed)


write_qwen3_5_checkpoint = Writer(qwen3_5, (*TEXT, "tiny-moe"), dtype="bfloat16")

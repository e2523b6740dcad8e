"""GLM-4.1V and GLM-4.5V checkpoints made on the spot, like those of LLaVA in `checkpoint`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: a vision encoder with learned
positions that are interpolated, a convolution that makes one token of 2 x 2 patches, and positions of three numbers.
"released" has the shapes of GLM-4.1V-9B, and with `moe=True` those of GLM-4.5V (106B), for vLLM's
`load_format="dummy"`; only its token ids are those of our tokenizer. The directories are laid out like
`zai-org/GLM-4.1V-9B-Thinking` and `zai-org/GLM-4.5V`, whose weights have the names of transformers' modules, but each
expert's apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
)

from vllm_vtprune_checkpoints.directories import shapes_of, tokenizer_with, write_directory
from vllm_vtprune_checkpoints.llava import TRAINED_TOKENS, DType
from vllm_vtprune_checkpoints.weights import Shape

Size = Literal["tiny", "released"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}

PIXELS: dict[Size, tuple[int, int]] = {"tiny": (112 * 112, 2 * 336 * 336), "released": (112 * 112, 9_633_792)}
"""Fewest and most pixels of an image after it was resized, which count twice; 28 x 28 make a token."""

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(depth=4, hidden_size=128, num_heads=4, image_size=112),
    "released": dict(depth=24, hidden_size=1536, num_heads=12, image_size=336),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2304,
        max_position_embeddings=32_768,
    ),
    "released": dict(
        hidden_size=4096,
        intermediate_size=13_696,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=2,
        vocab_size=151_552,
        max_position_embeddings=65_536,
    ),
}
EXPERTS: dict[Size, dict[str, Any]] = {
    "tiny": dict(head_dim=64, use_qk_norm=False, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2),
    "released": dict(
        head_dim=128,
        use_qk_norm=False,
        intermediate_size=10_944,
        num_hidden_layers=46,
        num_attention_heads=96,
        num_key_value_heads=8,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        num_experts_per_tok=8,
    ),
}
"""What a mixture of experts has instead."""

MROPE_SECTION: dict[Size, list[int]] = {"tiny": [4, 6, 6], "released": [8, 12, 12]}  # of a quarter of a head

# The form of zai-org/GLM-4.1V-9B-Thinking.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
            {%- elif part['type'] in ('video', 'video_url') -%}
                {{- '<|begin_of_video|><|video|><|end_of_video|>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def write_glm4v_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    moe: bool = False,
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a GLM-4.1V checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (4 million parameters) or "released" (the shapes of GLM-4.1V-9B, or GLM-4.5V).
        moe: GLM-4.5V, whose language model is a mixture of experts.
        weights: without, everything but the weights, for `load_format="dummy"`.
        seed: each tensor depends on this and on its name, so shards hold the same numbers.
        shards: number of weight files; more than one come with an index.
        dtype: of the weights, and the one that the configuration announces.
    """
    limits = dict(zip(("shortest_edge", "longest_edge"), PIXELS[size], strict=True))
    config = glm4v_config(size, dtype, moe=moe)
    return write_directory(
        Path(directory),
        config,
        Glm4vProcessor(
            image_processor=Glm4vImageProcessor(size=limits),
            tokenizer=tokenizer_with(SPECIAL_TOKENS, eos="<|user|>", pad="<|endoftext|>", max_length=65_536),
            video_processor=Glm4vVideoProcessor(size=limits),
            chat_template=CHAT_TEMPLATE,
        ),
        shapes=released_shapes(config) if weights else None,
        texture=2.0,
        seed=seed,
        shards=shards,
    )


def glm4v_config(size: Size, dtype: DType = "float32", *, moe: bool = False) -> Glm4vConfig | Glm4vMoeConfig:
    """The configuration of GLM-4.1V in a size, or with `moe` that of GLM-4.5V."""
    text = TEXT[size] | (EXPERTS[size] if moe else {})
    return (Glm4vMoeConfig if moe else Glm4vConfig)(
        architectures=["Glm4vMoeForConditionalGeneration" if moe else "Glm4vForConditionalGeneration"],
        vision_config=dict(
            out_hidden_size=text["hidden_size"], intermediate_size=text["intermediate_size"], **VISION[size]
        ),
        text_config=dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=1e4, mrope_section=MROPE_SECTION[size], partial_rotary_factor=0.5
            ),
            eos_token_id=[TOKEN_ID["<|endoftext|>"], TOKEN_ID["<|user|>"], TOKEN_ID["<|observation|>"]],
            pad_token_id=TOKEN_ID["<|endoftext|>"],
            attention_bias=True,  # vLLM asks for it; transformers has the biases of GLM-4.1V in any case
            **text,
        ),
        image_token_id=TOKEN_ID["<|image|>"],
        video_token_id=TOKEN_ID["<|video|>"],
        image_start_token_id=TOKEN_ID["<|begin_of_image|>"],
        image_end_token_id=TOKEN_ID["<|end_of_image|>"],
        video_start_token_id=TOKEN_ID["<|begin_of_video|>"],
        video_end_token_id=TOKEN_ID["<|end_of_video|>"],
        dtype=dtype,
    )


def released_shapes(config: Glm4vConfig | Glm4vMoeConfig) -> dict[str, Shape]:
    """The weights of a checkpoint: those of transformers' module, but each expert's apart."""
    if isinstance(config, Glm4vMoeConfig):
        return _apart(shapes_of(Glm4vMoeForConditionalGeneration, config))
    return shapes_of(Glm4vForConditionalGeneration, config)


def _apart(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        module, _, weight = name.rpartition(".")
        if not module.endswith(".experts"):
            found[name] = shape
            continue
        experts, rows, columns = shape
        parts = {"gate_proj": rows // 2, "up_proj": rows // 2} if weight == "gate_up_proj" else {weight: rows}
        for expert in range(experts):
            found |= {f"{module}.{expert}.{part}.weight": (part_rows, columns) for part, part_rows in parts.items()}
    return found

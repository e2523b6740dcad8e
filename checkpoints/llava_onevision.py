"""LLaVA-OneVision checkpoints made on the spot, laid out like `llava-hf/llava-onevision-qwen2-0.5b-ov-hf`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: SigLIP, whose patches leave a
margin of the image out; 36 arrangements of squares, whose tokens are scaled down to as many as 9 squares have where
they are more; a newline after each row. "0.5b" has the released shapes for vLLM's `load_format="dummy"`, with the token
ids of our tokenizer.
"""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path
from typing import Any, Literal

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from vllm_vtprune_checkpoints.chatml import END, END_OF_TEXT, START, chatml_tokenizer
from vllm_vtprune_checkpoints.llava import RENAMES, TRAINED_TOKENS, DType
from vllm_vtprune_checkpoints.qwen2_5_vl import write_qwen_checkpoint

Size = Literal["tiny", "0.5b"]

PATCH_SIZE = 14
PINPOINTS = tuple(product(range(1, 7), repeat=2))  # heights and widths in squares

NAMED_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
SPECIAL_TOKENS = (END_OF_TEXT, START, END, *NAMED_TOKENS.values())
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(image_size=60, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4),
    "0.5b": dict(
        image_size=384, hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16
    ),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2304,
        max_position_embeddings=16_384,
    ),
    "0.5b": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=152_000,
        max_position_embeddings=32_768,
    ),
}

# Of a message, first the images, then the videos, then the text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + ' ' -}}
    {%- if message['content'] is string -%}
        {{- '\\n' + message['content'] -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
            {{- '<image>' -}}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] in ('video', 'video_url') -%}
            {{- '<video>' -}}
        {%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- '\\n' + part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_llava_onevision_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a LLaVA-OneVision checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (3 million parameters, 16 tokens a square) or "0.5b" (the released shapes).
        weights, seed, shards, dtype: as for `write_llava_checkpoint`.
    """
    config = llava_onevision_config(size, dtype)
    side = config.vision_config.image_size
    pixels: dict[str, Any] = dict(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return write_qwen_checkpoint(
        Path(directory),
        LlavaOnevisionForConditionalGeneration,
        config,
        LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **pixels),
            tokenizer=chatml_tokenizer(SPECIAL_TOKENS, max_length=32_768, named_tokens=NAMED_TOKENS),
            video_processor=LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=(side // PATCH_SIZE) ** 2,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=CHAT_TEMPLATE,
        ),
        prefixes=(*RENAMES["vllm"], ("model.image_newline", "image_newline")),
        weights=weights,
        seed=seed,
        shards=shards,
    )


def llava_onevision_config(size: Size, dtype: DType = "float32") -> LlavaOnevisionConfig:
    """The configuration of LLaVA-OneVision in a size."""
    side, tied = VISION[size]["image_size"], size == "0.5b"
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        vision_config=SiglipVisionConfig(patch_size=PATCH_SIZE, vision_use_head=False, **VISION[size]),
        text_config=Qwen2Config(
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            bos_token_id=TOKEN_ID[END_OF_TEXT],
            eos_token_id=TOKEN_ID[END],
            tie_word_embeddings=tied,
            **TEXT[size],
        ),
        image_token_index=TOKEN_ID["<image>"],
        video_token_index=TOKEN_ID["<video>"],
        image_grid_pinpoints=[[side * rows, side * columns] for rows, columns in PINPOINTS],
        tie_word_embeddings=tied,
        dtype=dtype,
    )

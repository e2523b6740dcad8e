"""Mistral-Small-3.1 checkpoints made on the spot, in the layout for transformers. See `checkpoint`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: Pixtral's vision encoder, which
takes images of any aspect ratio, a merger of 2 x 2 patches, and a prompt with a token after each row of an image. "24b"
has the shapes of Mistral-Small-3.1-24B for vLLM's `load_format="dummy"`; only its token ids are those of our tokenizer.
The directories are laid out like `mistralai/Mistral-Small-3.1-24B-Instruct-2503`, without the files for mistral-common.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from tokenizers import processors
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)

from vllm_vtprune_checkpoints.directories import shapes_of, tokenizer_with, write_directory
from vllm_vtprune_checkpoints.llava import BOS, EOS, TRAINED_TOKENS, UNK, DType
from vllm_vtprune_checkpoints.weights import renamed

Size = Literal["tiny", "24b"]

PATCH_SIZE = 14
ACROSS = 2  # patches of a token, in either direction

SPECIAL_TOKENS = (
    "[INST]",
    "[/INST]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}

IMAGE_SIZE: dict[Size, int] = {"tiny": 336, "24b": 1540}
"""Most pixels of an image's longer edge; 28 x 28 make a token."""

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4),
    "24b": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2304,
    ),
    "24b": dict(
        hidden_size=5120,
        intermediate_size=32_768,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=131_072,
    ),
}

# From transformers' module names to the released ones.
RELEASED = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

# The form of the released one, but for the system turn that it gives a prompt without.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- {'system': '[SYSTEM_PROMPT]', 'user': '[INST]', 'assistant': ''}[message['role']] -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- '[IMG]' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- {'system': '[/SYSTEM_PROMPT]', 'user': '[/INST]', 'assistant': eos_token}[message['role']] -}}
{%- endfor -%}
"""


def write_mistral3_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a Mistral-Small-3.1 checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (3 million parameters) or "24b" (the shapes of Mistral-Small-3.1-24B).
        weights: without, everything but the weights, for `load_format="dummy"`.
        seed: each tensor depends on this and on its name, so shards hold the same numbers.
        shards: number of weight files; more than one come with an index.
        dtype: of the weights, and the one that the configuration announces.
    """
    tokenizer = tokenizer_with(SPECIAL_TOKENS, first=(UNK, BOS, EOS), bos=BOS, eos=EOS, pad="<pad>", max_length=131_072)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    config = mistral3_config(size, dtype)
    return write_directory(
        Path(directory),
        config,
        PixtralProcessor(
            image_processor=PixtralImageProcessor(
                size={"longest_edge": IMAGE_SIZE[size]}, patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE}
            ),
            tokenizer=tokenizer,
            patch_size=PATCH_SIZE,
            spatial_merge_size=ACROSS,
            chat_template=CHAT_TEMPLATE,
        ),
        shapes=shapes_of(Mistral3ForConditionalGeneration, config) if weights else None,
        rename=lambda name: renamed(name, RELEASED),
        texture=2.0,
        seed=seed,
        shards=shards,
    )


def mistral3_config(size: Size, dtype: DType = "float32") -> Mistral3Config:
    """The configuration of Mistral-Small-3.1 in a size."""
    return Mistral3Config(
        architectures=["Mistral3ForConditionalGeneration"],
        vision_config=PixtralVisionConfig(
            image_size=IMAGE_SIZE[size],
            patch_size=PATCH_SIZE,
            hidden_act="silu",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **VISION[size],
        ),
        text_config=MistralConfig(
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e9},
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=TOKEN_ID["<pad>"],
            tie_word_embeddings=False,
            **TEXT[size],
        ),
        image_token_index=TOKEN_ID["[IMG]"],
        spatial_merge_size=ACROSS,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        multimodal_projector_bias=False,
        tie_word_embeddings=False,
        dtype=dtype,
    )

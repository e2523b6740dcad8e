"""Idefics3 checkpoints made on the spot, laid out like `HuggingFaceTB/SmolVLM-Instruct`. See `checkpoint`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights; "2b" has SmolVLM's shapes for
vLLM's `load_format="dummy"`, with the token ids of our tokenizer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
)

from vllm_vtprune.demo.checkpoint import TRAINED_TOKENS, DType
from vllm_vtprune.demo.directories import shapes_of, tokenizer_with, write_directory

Size = Literal["tiny", "2b"]

PATCH_SIZE = 14
TILE: dict[Size, int] = {"tiny": 84, "2b": 384}  # pixels of a side
ACROSS: dict[Size, int] = {"tiny": 2, "2b": 3}  # patches of a token, in either direction
VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4),
    "2b": dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=2304),
    "2b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, vocab_size=49_155
    ),
}

BEGIN, END, PAD, IMAGE = "<|im_start|>", "<end_of_utterance>", "<|im_end|>", "<image>"
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SPECIAL_TOKENS = (BEGIN, END, PAD, IMAGE, "<fake_token_around_image>", "<global-img>", *PLACES)
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}

CHAT_TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
    {{- message['role'] | capitalize }}{{ ':' if message['content'][0]['type'] == 'image' else ': ' -}}
    {%- for part in message['content'] -%}
        {{- part['text'] if part['type'] == 'text' else '<image>' -}}
    {%- endfor -%}
    {{- '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""


def write_idefics3_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a checkpoint into `directory` and return its path.

    Args:
        size: see above.
        weights, seed, shards, dtype: as for `write_llava_checkpoint`.
    """
    config, tile = idefics3_config(size, dtype), TILE[size]
    return write_directory(
        Path(directory),
        config,
        Idefics3Processor(
            image_processor=Idefics3ImageProcessor(
                size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile}
            ),
            tokenizer=tokenizer_with(SPECIAL_TOKENS, bos=BEGIN, eos=END, pad=PAD, max_length=16_384),
            image_seq_len=(tile // PATCH_SIZE // ACROSS[size]) ** 2,
            chat_template=CHAT_TEMPLATE,
        ),
        shapes=shapes_of(Idefics3ForConditionalGeneration, config) if weights else None,
        texture=2.0,
        seed=seed,
        shards=shards,
    )


def idefics3_config(size: Size, dtype: DType = "float32") -> Idefics3Config:
    """The configuration of a size."""
    ids = dict(bos_token_id=TOKEN_ID[BEGIN], eos_token_id=TOKEN_ID[END], pad_token_id=TOKEN_ID[PAD])
    return Idefics3Config(
        architectures=["Idefics3ForConditionalGeneration"],
        vision_config=dict(image_size=TILE[size], patch_size=PATCH_SIZE, **VISION[size]),
        text_config=LlamaConfig(max_position_embeddings=16_384, **TEXT[size], **ids),
        scale_factor=ACROSS[size],
        image_token_id=TOKEN_ID[IMAGE],
        pad_token_id=TOKEN_ID[PAD],
        tie_word_embeddings=False,
        dtype=dtype,
    )

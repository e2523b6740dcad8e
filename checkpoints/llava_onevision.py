"""LLaVA-OneVision checkpoints, laid out like `llava-hf/llava-onevision-qwen2-0.5b-ov-hf`.

SigLIP, whose patches leave a margin of the image out; 36 arrangements of squares, whose tokens are scaled down to as
many as 9 squares have where they are more; a newline after each row.
"""

import math
from itertools import product
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    SiglipVisionConfig,
)

from vllm_vtprune_checkpoints.internvl import qwen2
from vllm_vtprune_checkpoints.llava import NAMES
from vllm_vtprune_checkpoints.tokens import CHATML, END_OF_TEXT, ids_of, make_tokenizer
from vllm_vtprune_checkpoints.writing import Checkpoint, Shape, Writer, even_weight, noise, widths

PATCH_SIZE = 14
PINPOINTS = tuple(product(range(1, 7), repeat=2))  # heights and widths in squares

NAMED_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
SPECIAL_TOKENS = (*CHATML, *NAMED_TOKENS.values())
TOKEN_ID = ids_of(SPECIAL_TOKENS)

VISION = {"tiny": widths(128, 256, 4, 4, image_size=60), "0.5b": widths(1152, 4304, 26, 16, image_size=384)}
TEXT = {"tiny": widths(256, 512, 2, 4, 2, 2304, 16_384), "0.5b": widths(896, 4864, 24, 14, 2, 152_000, 32_768)}

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


def llava_onevision(size: str) -> Checkpoint:
    """What a checkpoint holds; `size`: "tiny" (3 million parameters, 16 tokens a square) or "0.5b" (as released)."""
    side, tied = VISION[size]["image_size"], size == "0.5b"
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(patch_size=PATCH_SIZE, vision_use_head=False, **VISION[size]),
        text_config=qwen2(TEXT[size], tied=tied),
        image_token_index=TOKEN_ID["<image>"],
        video_token_index=TOKEN_ID["<video>"],
        image_grid_pinpoints=[[side * rows, side * columns] for rows, columns in PINPOINTS],
        tie_word_embeddings=tied,
    )
    pixels: dict[str, Any] = dict(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **pixels),
        tokenizer=make_tokenizer(SPECIAL_TOKENS, max_length=32_768, named=NAMED_TOKENS),
        video_processor=LlavaOnevisionVideoProcessor(**pixels),
        num_image_tokens=(side // PATCH_SIZE) ** 2,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
    )
    return Checkpoint(
        LlavaOnevisionForConditionalGeneration, config, processor, NAMES, weight=_weight, ends=[END_OF_TEXT]
    )


def _weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    if "embedding.weight" in name:  # positions differ more than elsewhere, as a square has 16
        return noise(name, shape, seed).mul_(1 / math.sqrt(math.prod(shape[1:])))
    return even_weight(name, shape, seed)


write_llava_onevision_checkpoint = Writer(llava_onevision, TEXT)

"""A checkpoint of an architecture that has nothing to do with those we prune: a tiny random Qwen2-VL."""

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vllm_vtprune_checkpoints.qwen2_5_vl import (
    MROPE_SECTION,
    PIXELS,
    PLACEHOLDERS,
    SPECIAL_TOKENS,
    TEXT,
    TOKEN_ID,
    VISION_IDS,
)
from vllm_vtprune_checkpoints.tokens import END, END_OF_TEXT, chatml_template, make_tokenizer


def write_foreign_checkpoint(directory: Path) -> Path:
    """Write it, in float32; 28 x 28 pixels are a token."""
    directory.mkdir(parents=True, exist_ok=True)
    config = Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        vision_config=dict(depth=2, embed_dim=128, num_heads=4, hidden_size=TEXT["tiny"]["hidden_size"]),
        text_config=dict(
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=MROPE_SECTION["tiny"]),
            bos_token_id=TOKEN_ID[END_OF_TEXT],
            eos_token_id=TOKEN_ID[END],
            **TEXT["tiny"],
        ),
        **VISION_IDS,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
    ends = [TOKEN_ID[END], TOKEN_ID[END_OF_TEXT]]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(directory)
    fewest, most = PIXELS["tiny"]
    image_processor = Qwen2VLImageProcessor(min_pixels=fewest, max_pixels=most)
    Qwen2VLProcessor(
        image_processor=image_processor,
        tokenizer=make_tokenizer(SPECIAL_TOKENS, max_length=32_768),
        video_processor=Qwen2VLVideoProcessor(min_pixels=fewest, max_pixels=most),
        chat_template=chatml_template(**PLACEHOLDERS),
    ).save_pretrained(directory)
    image_processor.save_pretrained(directory)
    return directory

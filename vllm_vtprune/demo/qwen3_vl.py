"""Qwen3-VL checkpoints made on the spot, like those of Qwen2.5-VL in `qwen2_5_vl`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: features of two layers of the
encoder that are added to the hidden states after the first two of the language model (DeepStack), and interleaved
positions of three numbers. "4b" has the shapes of Qwen3-VL-4B for vLLM's `load_format="dummy"`; only its token ids are
those of our tokenizer. The directories are laid out like `Qwen/Qwen3-VL-4B-Instruct`, whose weights have the names of
transformers' modules.
"""

import os
from pathlib import Path
from typing import Any, Literal

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vllm_vtprune.demo.chatml import END, END_OF_TEXT, chat_template, chatml_tokenizer
from vllm_vtprune.demo.checkpoint import DType
from vllm_vtprune.demo.qwen2_5_vl import PLACEHOLDERS, SPECIAL_TOKENS, TOKEN_ID, write_qwen_checkpoint

Size = Literal["tiny", "4b"]

PIXELS: dict[Size, tuple[int, int]] = {"tiny": (64 * 64, 784 * 784), "4b": (256 * 256, 4096 * 4096)}
"""Fewest and most pixels of an image after it was resized; 32 x 32 make a token."""

VIDEO_PIXELS: dict[Size, tuple[int, int]] = {"tiny": (64 * 64, 784 * 784), "4b": (64 * 64, 25_165_824)}
"""The same of all frames of a video together."""

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        depth=4,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        num_position_embeddings=24 * 24,
        deepstack_visual_indexes=[0, 2],
    ),
    "4b": dict(
        depth=24,
        hidden_size=1024,
        intermediate_size=4096,
        num_heads=16,
        num_position_embeddings=48 * 48,
        deepstack_visual_indexes=[5, 11, 17],
    ),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2304,
        max_position_embeddings=32_768,
    ),
    "4b": dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=262_144,
    ),
}
MROPE_SECTION: dict[Size, list[int]] = {"tiny": [12, 10, 10], "4b": [24, 20, 20]}  # of half a head, by dimension


def write_qwen3_vl_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    weights: bool = True,
    tied: bool | None = None,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a Qwen3-VL checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (4 million parameters) or "4b" (the shapes of Qwen3-VL-4B).
        weights: without, everything but the weights, for `load_format="dummy"`.
        tied: whether input and output embeddings are one table; None for what is released: of the 4B model.
        seed: each tensor depends on this and on its name, so shards hold the same numbers.
        shards: number of weight files; more than one come with an index.
        dtype: of the weights, and the one that the configuration announces.
    """
    return write_qwen_checkpoint(
        Path(directory),
        Qwen3VLForConditionalGeneration,
        qwen3_vl_config(size, dtype, tied=size == "4b" if tied is None else tied),
        Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(
                size=_limits(PIXELS[size]), patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
            ),
            tokenizer=chatml_tokenizer(SPECIAL_TOKENS, max_length=262_144),
            video_processor=Qwen3VLVideoProcessor(size=_limits(VIDEO_PIXELS[size])),
            chat_template=chat_template(**PLACEHOLDERS),
        ),
        texture=4.0,
        weights=weights,
        seed=seed,
        shards=shards,
    )


def qwen3_vl_config(size: Size, dtype: DType = "float32", *, tied: bool = False) -> Qwen3VLConfig:
    """The configuration of Qwen3-VL in a size; `tied`: input and output embeddings are one table."""
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        vision_config=dict(out_hidden_size=TEXT[size]["hidden_size"], patch_size=16, **VISION[size]),
        text_config=dict(
            rms_norm_eps=1e-6,
            rope_parameters=dict(
                rope_type="default", rope_theta=5e6, mrope_section=MROPE_SECTION[size], mrope_interleaved=True
            ),
            bos_token_id=TOKEN_ID[END_OF_TEXT],
            eos_token_id=TOKEN_ID[END],
            tie_word_embeddings=tied,
            **TEXT[size],
        ),
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def _limits(pixels: tuple[int, int]) -> dict[str, int]:
    fewest, most = pixels
    return {"shortest_edge": fewest, "longest_edge": most}

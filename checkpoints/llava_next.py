"""LLaVA-NeXT checkpoints made on the spot, laid out like `llava-hf/llava-v1.6-vicuna-7b-hf`. See `checkpoint`."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from vllm_vtprune_checkpoints.llava import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN_ID,
    RENAMES,
    TEXT,
    VISION,
    DType,
    Naming,
    Size,
    demo_tokenizer,
    random_weight,
)
from vllm_vtprune_checkpoints.weights import renamed, write_weights

PATCH_SIZE = 14
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # heights and widths in squares


def write_llava_next_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    image_size: int = 336,
    naming: Naming = "vllm",
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a LLaVA-NeXT checkpoint into `directory` and return its path.

    Args:
        image_size: pixels of a square's side; a smaller one than the released 336 has fewer tokens, for tests.
        size, naming, weights, seed, shards, dtype: As for `write_llava_checkpoint`; "7b" has the shapes of
            LLaVA-NeXT-7B (v1.6, vicuna).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = llava_next_config(size, image_size, dtype)
    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=config.image_token_index + 1).save_pretrained(
        directory
    )
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=demo_tokenizer(size),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the CLS token
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    image_processor.save_pretrained(directory)  # released ones have this file, transformers 5 does not write it
    if weights:
        with torch.device("meta"):
            model = LlavaNextForConditionalGeneration(config)
        write_weights(
            directory,
            {name: tuple(weight.shape) for name, weight in model.state_dict().items()},
            rename=lambda name: renamed(name, _renames(naming)),
            weight=lambda name, shape: random_weight(name, shape, seed),
            shards=shards,
            dtype=getattr(torch, dtype),
        )
    return directory


def llava_next_config(size: Size, image_size: int = 336, dtype: DType = "float32") -> LlavaNextConfig:
    """The configuration of LLaVA-NeXT in a size; `image_size`: pixels of a square's side."""
    text: dict[str, Any] = TEXT[size]
    return LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"],
        vision_config=CLIPVisionConfig(image_size=image_size, patch_size=PATCH_SIZE, **VISION[size]),
        text_config=LlamaConfig(
            max_position_embeddings=16384 if size == "tiny" else 4096,  # so that several images have room
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=IMAGE_TOKEN_ID[size] + 1,
            **text,
        ),
        image_token_index=IMAGE_TOKEN_ID[size],
        image_seq_length=(image_size // PATCH_SIZE) ** 2,
        image_grid_pinpoints=[[rows * image_size, columns * image_size] for rows, columns in PINPOINTS],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _renames(naming: Naming) -> tuple[tuple[str, str], ...]:
    return RENAMES[naming] if naming == "module" else (*RENAMES[naming], ("model.image_newline", "image_newline"))

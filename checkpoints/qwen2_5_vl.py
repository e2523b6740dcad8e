"""Qwen2.5-VL checkpoints made on the spot, like those of LLaVA in `checkpoint`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: windows, full attention in every
second layer, the 2 x 2 merger and positions of three numbers. "3b" has the shapes of Qwen2.5-VL-3B for vLLM's
`load_format="dummy"`; only its token ids are those of our tokenizer. The directories are laid out like
`Qwen/Qwen2.5-VL-3B-Instruct`, with weights under the released names ("vllm") or those of transformers' modules
("module"), which it writes with `save_original_format=False`.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vllm_vtprune_checkpoints.chatml import END, END_OF_TEXT, START, chat_template, chatml_tokenizer
from vllm_vtprune_checkpoints.llava import TRAINED_TOKENS, DType
from vllm_vtprune_checkpoints.weights import Shape, noise, renamed, write_weights

Size = Literal["tiny", "3b"]
Naming = Literal["vllm", "module"]

SPECIAL_TOKENS = (
    END_OF_TEXT,
    START,
    END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate(SPECIAL_TOKENS)}
PIXELS: dict[Size, tuple[int, int]] = {"tiny": (56 * 56, 784 * 784), "3b": (56 * 56, 12_845_056)}
"""Fewest and most pixels of an image after it was resized; 28 x 28 make a token."""

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4, fullatt_block_indexes=[1, 3]),
    "3b": dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31]),
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
    "3b": dict(
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151_936,
        max_position_embeddings=128_000,
    ),
}
MROPE_SECTION: dict[Size, list[int]] = {"tiny": [8, 12, 12], "3b": [16, 24, 24]}  # of half a head, by dimension

RENAMES: dict[Naming, tuple[tuple[str, str], ...]] = {
    "vllm": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "module": (),
}


def write_qwen2_5_vl_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    naming: Naming = "vllm",
    weights: bool = True,
    tied: bool | None = None,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a Qwen2.5-VL checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (3 million parameters) or "3b" (the shapes of Qwen2.5-VL-3B).
        naming: the names of the weights in the file, see above.
        weights: without, everything but the weights, for `load_format="dummy"`.
        tied: whether input and output embeddings are one table; None for what is released: of the small model alone.
        seed: each tensor depends on this and on its name, so namings and shards hold the same numbers.
        shards: number of weight files; more than one come with an index.
        dtype: of the weights, and the one that the configuration announces.
    """
    fewest, most = PIXELS[size]
    return write_qwen_checkpoint(
        Path(directory),
        Qwen2_5_VLForConditionalGeneration,
        qwen2_5_vl_config(size, dtype, tied=size == "3b" if tied is None else tied),
        Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(min_pixels=fewest, max_pixels=most),
            tokenizer=chatml_tokenizer(SPECIAL_TOKENS, max_length=131_072),
            video_processor=Qwen2VLVideoProcessor(min_pixels=fewest, max_pixels=most),
            chat_template=chat_template(**PLACEHOLDERS, system="You are a helpful assistant."),
        ),
        prefixes=RENAMES[naming],
        weights=weights,
        seed=seed,
        shards=shards,
    )


def write_qwen_checkpoint(
    directory: Path,
    model_class: type[PreTrainedModel],
    config: Any,
    processor: ProcessorMixin,
    *,
    prefixes: tuple[tuple[str, str], ...] = (),
    texture: float = 2.0,
    weights: bool,
    seed: int,
    shards: int,
) -> Path:
    """Write a checkpoint of any Qwen-VL into `directory` and return its path.

    Args:
        model_class: of transformers, whose weights are written.
        config: of the model; its `dtype` is that of the weights.
        processor: with `image_processor`.
        prefixes: (module's, file's) of the names of the weights, where they differ.
        texture: how strongly patches differ; more where the processor leaves less contrast in the pixels.
        weights, seed, shards: as for `write_qwen2_5_vl_checkpoint`.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, not {shards}")
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    ends = [TOKEN_ID[END], TOKEN_ID[END_OF_TEXT]]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1]).save_pretrained(directory)
    processor.save_pretrained(directory)
    # transformers 5 puts this into processor_config.json; released checkpoints have it in a file of its own
    processor.image_processor.save_pretrained(directory)
    if weights:
        write_weights(
            directory,
            _shapes(model_class, config),
            rename=lambda name: renamed(name, prefixes),
            weight=lambda name, shape: _random_weight(name, shape, seed, texture),
            shards=shards,
            dtype=config.dtype,
        )
    return directory


def qwen2_5_vl_config(size: Size, dtype: DType = "float32", *, tied: bool = False) -> Qwen2_5_VLConfig:
    """The configuration of Qwen2.5-VL in a size; `tied`: input and output embeddings are one table."""
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config=dict(
            out_hidden_size=TEXT[size]["hidden_size"], tokens_per_second=2, window_size=112, **VISION[size]
        ),
        text_config=dict(
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=MROPE_SECTION[size]),
            bos_token_id=TOKEN_ID[END_OF_TEXT],
            eos_token_id=TOKEN_ID[END],
            **TEXT[size],
        ),
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def _shapes(model_class: type[PreTrainedModel], config: Any) -> dict[str, Shape]:
    with torch.device("meta"):
        model = model_class(config)
    stored = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del stored["lm_head.weight"]
    return stored


def _random_weight(name: str, shape: Shape, seed: int, texture: float) -> torch.Tensor:
    """Weights under which patches look different and the next token depends on all of them."""
    values = noise(name, shape, seed)
    if name.endswith(".bias"):
        return values.mul_(0.1)
    if "norm" in name or ".ln_q." in name:
        return values.mul_(0.1).add_(1.0)
    if "embed_tokens" in name:
        return values
    if "patch_embed." in name:
        values -= values.mean(dim=(2, 3, 4), keepdim=True).mul_(0.7)  # look for texture more than for brightness
        values *= texture
    gain = 2.0 if "lm_head" in name else 1.0  # attention stays even, so each token counts
    return values.mul_(gain / math.sqrt(math.prod(shape[1:])))

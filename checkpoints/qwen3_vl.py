"""Qwen3-VL checkpoints made on the spot, like those of Qwen2.5-VL in `qwen2_5_vl`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: features of two layers of the
encoder that are added to the hidden states after the first two of the language model (DeepStack), and interleaved
positions of three numbers. "4b" has the shapes of Qwen3-VL-4B for vLLM's `load_format="dummy"`; only its token ids are
those of our tokenizer. The directories are laid out like `Qwen/Qwen3-VL-4B-Instruct`, whose weights have the names of
transformers' modules.

"tiny-moe" and "30b-a3b" are the same of Qwen3-VL-MoE, laid out like `Qwen/Qwen3-VL-30B-A3B-Instruct`: an encoder of the
same kind, and experts in every layer of the language model, whose matrices the files hold transposed.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    PreTrainedModel,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vllm_vtprune_checkpoints import directories
from vllm_vtprune_checkpoints.chatml import END, END_OF_TEXT, chat_template, chatml_tokenizer
from vllm_vtprune_checkpoints.llava import DType
from vllm_vtprune_checkpoints.qwen2_5_vl import PLACEHOLDERS, SPECIAL_TOKENS, TOKEN_ID, write_qwen_checkpoint
from vllm_vtprune_checkpoints.weights import Shape, write_weights

Size = Literal["tiny", "4b", "tiny-moe", "30b-a3b"]

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
    "30b-a3b": dict(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        num_position_embeddings=48 * 48,
        deepstack_visual_indexes=[8, 16, 24],
    ),
}
VISION["tiny-moe"] = VISION["tiny"]
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
    "30b-a3b": dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=262_144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,  # transformers knows of nothing else
    ),
}
TEXT["tiny-moe"] = TEXT["tiny"] | dict(
    moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
)
MROPE_SECTION: dict[int, list[int]] = {64: [12, 10, 10], 128: [24, 20, 20]}
"""Of half a head, by dimension; the key is the size of a head."""


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
        size: "tiny" (4 million parameters), "4b" (the shapes of Qwen3-VL-4B), and those with experts: "tiny-moe"
            (4 million parameters) and "30b-a3b" (the shapes of Qwen3-VL-30B-A3B).
        weights: without, everything but the weights, for `load_format="dummy"`.
        tied: whether input and output embeddings are one table; None for what is released: of the 4B model.
        seed: each tensor depends on this and on its name, so shards hold the same numbers.
        shards: number of weight files; more than one come with an index.
        dtype: of the weights, and the one that the configuration announces.
    """
    return write_qwen3_checkpoint(
        Path(directory),
        Qwen3VLMoeForConditionalGeneration if has_experts(size) else Qwen3VLForConditionalGeneration,
        qwen3_vl_config(size, dtype, tied=size == "4b" if tied is None else tied),
        template=chat_template(**PLACEHOLDERS),
        tiny=size.startswith("tiny"),
        weight=lambda name, shape: random_weight(name, shape, seed),
        weights=weights,
        shards=shards,
    )


def write_qwen3_checkpoint(
    directory: Path,
    model_class: type[PreTrainedModel],
    config: Any,
    *,
    template: str,
    tiny: bool,
    weight: Callable[[str, Shape], torch.Tensor],
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    weights: bool,
    shards: int,
) -> Path:
    """Write a checkpoint of a model with the processor of Qwen3-VL into `directory` and return its path.

    Args:
        model_class: of transformers, whose weights are written under the names of its modules.
        config: of the model; its `dtype` is that of the weights.
        template: of chats.
        tiny: whether images have the limits of a tiny model, or else the released ones.
        weight: makes the tensor for the file of its name and of its shape in the module.
        special_tokens: of the tokenizer, with the ids from `TRAINED_TOKENS` on; `SPECIAL_TOKENS` come first.
        weights, shards: as for `write_qwen3_vl_checkpoint`.
    """
    most = 784 * 784
    write_qwen_checkpoint(
        directory,
        model_class,
        config,
        Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(
                size=_limits(64 * 64, most) if tiny else _limits(256 * 256, 4096 * 4096),
                patch_size=16,
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
            ),
            tokenizer=chatml_tokenizer(special_tokens, max_length=262_144),
            video_processor=Qwen3VLVideoProcessor(size=_limits(64 * 64, most if tiny else 25_165_824)),
            chat_template=template,
        ),
        weights=False,
        seed=0,
        shards=shards,
    )
    if weights:
        shapes = directories.shapes_of(model_class, config)
        write_weights(directory, shapes, rename=str, weight=weight, shards=shards, dtype=config.dtype)
    return directory


def has_experts(size: Size) -> bool:
    """Whether a size is one of Qwen3-VL-MoE."""
    return "num_experts" in TEXT[size]


def qwen3_vl_config(size: Size, dtype: DType = "float32", *, tied: bool = False) -> Qwen3VLConfig | Qwen3VLMoeConfig:
    """The configuration of Qwen3-VL in a size; `tied`: input and output embeddings are one table."""
    config_class = Qwen3VLMoeConfig if has_experts(size) else Qwen3VLConfig
    text = TEXT[size]
    return config_class(
        architectures=[f"Qwen3VL{'Moe' if has_experts(size) else ''}ForConditionalGeneration"],
        vision_config=dict(out_hidden_size=text["hidden_size"], patch_size=16, **VISION[size]),
        text_config=dict(
            rms_norm_eps=1e-6,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=MROPE_SECTION[text["head_dim"]],
                mrope_interleaved=True,
            ),
            bos_token_id=TOKEN_ID[END_OF_TEXT],
            eos_token_id=TOKEN_ID[END],
            tie_word_embeddings=tied,
            **text,
        ),
        image_token_id=TOKEN_ID["<|image_pad|>"],
        video_token_id=TOKEN_ID["<|video_pad|>"],
        vision_start_token_id=TOKEN_ID["<|vision_start|>"],
        vision_end_token_id=TOKEN_ID["<|vision_end|>"],
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def random_weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """Weights under which patches look different, and the next token depends on all of them and on the experts."""
    texture = 4.0  # the processor leaves less contrast in the pixels than that of Qwen2.5-VL
    values = directories.random_weight(name, shape, seed, texture)
    if ".experts." in name:  # (experts, to, from) in transformers, (experts, from, to) in files
        return values.mul_(math.sqrt(shape[1])).transpose(1, 2).contiguous()
    return values


def _limits(fewest: int, most: int) -> dict[str, int]:
    """Fewest and most pixels of an image, or of all frames of a video, after resizing; 32 x 32 make a token."""
    return {"shortest_edge": fewest, "longest_edge": most}

"""Qwen3-VL checkpoints, laid out like `Qwen/Qwen3-VL-4B-Instruct`, or with experts `Qwen/Qwen3-VL-30B-A3B-Instruct`.

Features of some layers of the encoder are added to the hidden states after the first ones of the language model
(DeepStack), and positions of three numbers are interleaved. Weights have the names of transformers' modules. With
experts, files hold their matrices transposed.
"""

import math
from collections.abc import Sequence

import torch
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vllm_vtprune_checkpoints.qwen2_5_vl import PLACEHOLDERS, SPECIAL_TOKENS, VISION_IDS, blocks
from vllm_vtprune_checkpoints.tokens import CHATML_IDS, END_OF_TEXT, chatml_template, make_tokenizer
from vllm_vtprune_checkpoints.writing import Checkpoint, Shape, Writer, random_weight, widths

VISION = {
    "tiny": blocks(128, 256, 4, 4, num_position_embeddings=24 * 24, deepstack_visual_indexes=[0, 2]),
    "4b": blocks(1024, 4096, 24, 16, num_position_embeddings=48 * 48, deepstack_visual_indexes=[5, 11, 17]),
    "30b-a3b": blocks(1152, 4304, 27, 16, num_position_embeddings=48 * 48, deepstack_visual_indexes=[8, 16, 24]),
}
VISION["tiny-moe"] = VISION["tiny"]
TEXT = {
    "tiny": widths(256, 512, 3, 4, 2, 2304, 32_768, head_dim=64),
    "4b": widths(2560, 9728, 36, 32, 8, 151_936, 262_144, head_dim=128),
    "30b-a3b": widths(2048, 6144, 48, 32, 4, 151_936, 262_144, head_dim=128),
}
TEXT["tiny-moe"] = TEXT["tiny"]
EXPERTS = {
    "tiny-moe": dict(moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2),
    "30b-a3b": dict(moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
}
MROPE_SECTION = {64: [12, 10, 10], 128: [24, 20, 20]}
"""Of half a head, by dimension; the key is the size of a head."""


def qwen3_vl(size: str) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        size: "tiny" (4 million parameters), "4b" (the shapes of Qwen3-VL-4B), and those with experts: "tiny-moe" (4
            million parameters) and "30b-a3b" (the shapes of Qwen3-VL-30B-A3B).
    """
    # transformers knows of nothing else than normed shares of the experts
    text = TEXT[size] | (EXPERTS[size] | dict(norm_topk_prob=True) if size in EXPERTS else {})
    config = (Qwen3VLMoeConfig if size in EXPERTS else Qwen3VLConfig)(
        vision_config=dict(out_hidden_size=text["hidden_size"], patch_size=16, **VISION[size]),
        text_config=dict(
            rms_norm_eps=1e-6,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=MROPE_SECTION[text["head_dim"]],
                mrope_interleaved=True,
            ),
            tie_word_embeddings=size == "4b",
            **CHATML_IDS,
            **text,
        ),
        tie_word_embeddings=size == "4b",
        **VISION_IDS,
    )
    return Checkpoint(
        Qwen3VLMoeForConditionalGeneration if size in EXPERTS else Qwen3VLForConditionalGeneration,
        config,
        qwen3_processor(chatml_template(**PLACEHOLDERS), tiny=size.startswith("tiny")),
        weight=qwen3_weight,
        ends=[END_OF_TEXT],
    )


def qwen3_processor(template: str, *, tiny: bool, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Qwen3VLProcessor:
    """The processor of Qwen3-VL; `tiny`: images have the limits of a tiny model, or else the released ones."""
    most = 784 * 784
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=_limits(64 * 64, most) if tiny else _limits(256 * 256, 4096 * 4096),
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=make_tokenizer(special_tokens, max_length=262_144),
        video_processor=Qwen3VLVideoProcessor(size=_limits(64 * 64, most if tiny else 25_165_824)),
        chat_template=template,
    )


def qwen3_weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """`random_weight`, where the next token depends on the experts too."""
    # the processor leaves less contrast in the pixels than that of Qwen2.5-VL
    values = random_weight(name, shape, seed, texture=4.0, attention=1.0)
    if ".experts." in name:  # (experts, to, from) in transformers, (experts, from, to) in files
        return values.mul_(math.sqrt(shape[1])).transpose(1, 2).contiguous()
    return values


def _limits(fewest: int, most: int) -> dict[str, int]:
    """Fewest and most pixels of an image, or of all frames of a video, after resizing; 32 x 32 make a token."""
    return {"shortest_edge": fewest, "longest_edge": most}


write_qwen3_vl_checkpoint = Writer(qwen3_vl, TEXT)

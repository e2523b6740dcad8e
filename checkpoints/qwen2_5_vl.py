"""Qwen2.5-VL checkpoints, laid out like `Qwen/Qwen2.5-VL-3B-Instruct`.

Windows, full attention in some layers, the 2 x 2 merger and positions of three numbers.
"""

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vllm_vtprune_checkpoints.tokens import CHATML, CHATML_IDS, END_OF_TEXT, chatml_template, ids_of, make_tokenizer
from vllm_vtprune_checkpoints.writing import Checkpoint, Writer, even_weight, widths

SPECIAL_TOKENS = (
    *CHATML,
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PLACEHOLDERS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
TOKEN_ID = ids_of(SPECIAL_TOKENS)
VISION_IDS = {
    "image_token_id": TOKEN_ID["<|image_pad|>"],
    "video_token_id": TOKEN_ID["<|video_pad|>"],
    "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
    "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
}
PIXELS = {"tiny": (56 * 56, 784 * 784), "small": (56 * 56, 12_845_056), "3b": (56 * 56, 12_845_056)}
"""Fewest and most pixels of an image after it was resized; 28 x 28 make a token."""


def blocks(hidden_size: int, intermediate_size: int, depth: int, num_heads: int, **others: Any) -> dict[str, Any]:
    """Dimensions of an encoder by their names in configs of Qwen-VL."""
    return dict(
        hidden_size=hidden_size, intermediate_size=intermediate_size, depth=depth, num_heads=num_heads, **others
    )


# "small" is for load tests on a CPU: prefill costs much more than the rest. For that, its encoder has windows alone:
# full attention grows with the square of 40,000 patches.
VISION = {
    "tiny": blocks(128, 256, 4, 4, fullatt_block_indexes=[1, 3]),
    "small": blocks(256, 1024, 4, 4, fullatt_block_indexes=[]),
    "3b": blocks(1280, 3420, 32, 16, fullatt_block_indexes=[7, 15, 23, 31]),
}
TEXT = {
    "tiny": widths(256, 512, 2, 4, 2, 2304, 32_768),
    "small": widths(768, 2048, 6, 12, 2, 2304, 32_768),
    "3b": widths(2048, 11_008, 36, 16, 2, 151_936, 128_000),
}
MROPE_SECTION = {"tiny": [8, 12, 12], "small": [8, 12, 12], "3b": [16, 24, 24]}  # of half a head, by dimension


def qwen2_5_vl(size: str) -> Checkpoint:
    """What a checkpoint holds; `size`: "tiny" (3 million parameters), "small" (some 40 million) or "3b" (the shapes of
    Qwen2.5-VL-3B)."""
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            out_hidden_size=TEXT[size]["hidden_size"], tokens_per_second=2, window_size=112, **VISION[size]
        ),
        text_config=dict(
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=MROPE_SECTION[size]),
            **CHATML_IDS,
            **TEXT[size],
        ),
        tie_word_embeddings=size == "3b",
        **VISION_IDS,
    )
    fewest, most = PIXELS[size]
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=fewest, max_pixels=most),
        tokenizer=make_tokenizer(SPECIAL_TOKENS, max_length=131_072),
        video_processor=Qwen2VLVideoProcessor(min_pixels=fewest, max_pixels=most),
        chat_template=chatml_template(**PLACEHOLDERS, system="You are a helpful assistant."),
    )
    names = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
    return Checkpoint(
        Qwen2_5_VLForConditionalGeneration, config, processor, names, weight=even_weight, ends=[END_OF_TEXT]
    )


write_qwen2_5_vl_checkpoint = Writer(qwen2_5_vl, TEXT)

"""Gemma 4 checkpoints, laid out like `google/gemma-4-E2B-it` or `-31B-it`.

An encoder with positions along two axes whose 3 x 3 patches are averaged into a token, so many of them at most in the
shape of the image, and layers with a sliding window between those without. They come in the two ways of the family: as
the small models, with embeddings of each layer's own and causal attention, or as the `large` ones, with attention in
both directions within an image where the window slides.
"""

from typing import Any

import torch
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
)

from vllm_vtprune_checkpoints.gemma3 import NEWLINES, gemma_tokenizer, language_weight
from vllm_vtprune_checkpoints.tokens import chat_template, ids_of
from vllm_vtprune_checkpoints.writing import Checkpoint, Shape, Writer, even_weight, noise, widths

START, END = "<|turn>", "<turn|>"
NAMED_TOKENS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
SPECIAL_TOKENS = (START, END, *NAMED_TOKENS.values(), "<|video|>")
TOKEN_ID = ids_of((*NEWLINES, *SPECIAL_TOKENS))

MOST_TOKENS = {"tiny": 70, "e2b": 280}
"""Of an image; of the numbers that the family allows."""

VISION = {
    "tiny": widths(128, 256, 4, 4, 4, head_dim=32, position_embedding_size=256),
    "e2b": widths(768, 3072, 16, 12, 12, head_dim=64, position_embedding_size=10_240),
}
TEXT = {
    "tiny": widths(256, 512, 4, 4, 2, 2304, 32_768, head_dim=64, sliding_window=128),
    "e2b": widths(1536, 6144, 35, 8, 1, 262_144, 131_072, head_dim=256, sliding_window=512),
}
PERIOD = {"tiny": 2, "e2b": 5}
"""Layers to one without a window."""

PER_LAYER = {
    "tiny": dict(hidden_size_per_layer_input=16, num_kv_shared_layers=2),
    "e2b": dict(hidden_size_per_layer_input=256, num_kv_shared_layers=20),
}
"""What the small models have."""


def gemma4(size: str, *, large: bool = False, sliding_window: int | None = None) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        size: "tiny" (3 million parameters) or "e2b" (the shapes of Gemma 4 E2B, without audio).
        large: as the models from 26B on, see above.
        sliding_window: positions that a token of a layer with a window sees; None for 128 of "tiny" and the released
            512. An image of more tokens than that is no longer seen whole by each of them.
    """
    text = TEXT[size] | (dict(sliding_window=sliding_window) if sliding_window else {})
    ways: dict[str, Any] = dict(use_double_wide_mlp=True, **PER_LAYER[size])
    if large:
        ways = dict(
            use_bidirectional_attention="vision",
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
        )
    windows = [*["sliding_attention"] * (PERIOD[size] - 1), "full_attention"]
    config = Gemma4Config(
        vision_config=dict(
            default_output_length=MOST_TOKENS[size], use_clipped_linears=not large, standardize=large, **VISION[size]
        ),
        text_config=dict(
            layer_types=windows * (text["num_hidden_layers"] // PERIOD[size]),
            global_head_dim=2 * text["head_dim"],
            vocab_size_per_layer_input=text["vocab_size"],
            final_logit_softcapping=30.0,
            **ways,
            **text,
        ),
        audio_config=None,
        boi_token_id=TOKEN_ID["<|image>"],
        eoi_token_id=TOKEN_ID["<image|>"],
        image_token_id=TOKEN_ID["<|image|>"],
        video_token_id=TOKEN_ID["<|video|>"],
        boa_token_id=TOKEN_ID["<|audio>"],
        eoa_token_index=TOKEN_ID["<audio|>"],
        audio_token_id=TOKEN_ID["<|audio|>"],
        eos_token_id=[1, TOKEN_ID[END]],
    )
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(max_soft_tokens=MOST_TOKENS[size]),
        tokenizer=gemma_tokenizer(SPECIAL_TOKENS, NAMED_TOKENS),
        video_processor=Gemma4VideoProcessor(),
        # the released form without tools and thinking: a system message is a turn of its own
        chat_template=chat_template(
            before="{{- bos_token -}}\n",
            start="'<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'",
            end="'<turn|>\\n'",
            prompt="<|turn>model\\n",
            image="<|image|>",
            video="<|video|>",
            trim=True,
        ),
        image_seq_length=MOST_TOKENS[size],
    )
    return Checkpoint(Gemma4ForConditionalGeneration, config, processor, weight=_weight, ends=[END])


def _weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    if name.endswith(("input_min", "output_min")):
        return torch.full(shape, -2.0)
    if name.endswith(("input_max", "output_max")):
        return torch.full(shape, 2.0)
    if "position_embedding" in name or name.endswith("std_bias"):
        return noise(name, shape, seed)
    values = even_weight(name, shape, seed)
    if name.endswith(("layer_scalar", "std_scale")):
        return values.mul_(0.1).add_(1.0)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return values.mul_(shape[0] ** -0.25)  # attention divides by nothing
    return language_weight(name, values) if "language_model" in name else values


write_gemma4_checkpoint = Writer(gemma4, TEXT)

"""Gemma 4 checkpoints made on the spot, laid out like `google/gemma-4-E2B-it` or `-31B-it`. See `checkpoint`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: an encoder with positions along
two axes whose 3 x 3 patches are averaged into a token, at most 70 of them in the shape of the image, and layers with a
sliding window between those without. It comes in the two ways of the family: as the small models, with embeddings of
each layer's own and causal attention, or as the `large` ones, with attention in both directions within an image where
the window slides. "e2b" has the shapes of Gemma 4 E2B, without audio, for vLLM's `load_format="dummy"`; only its token
ids are those of our tokenizer. Weights come under the released names, which are those of transformers' modules.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GenerationConfig,
)

from vllm_vtprune_checkpoints.gemma3 import NEWLINES, gemma_tokenizer, language_weight
from vllm_vtprune_checkpoints.llava import TRAINED_TOKENS, DType
from vllm_vtprune_checkpoints.weights import Shape, noise, write_weights

Size = Literal["tiny", "e2b"]

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
TOKEN_ID = {token: TRAINED_TOKENS + len(NEWLINES) + index for index, token in enumerate(SPECIAL_TOKENS)}

MOST_TOKENS: dict[Size, int] = {"tiny": 70, "e2b": 280}
"""Of an image; of the numbers that the family allows."""

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        position_embedding_size=256,
    ),
    "e2b": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        position_embedding_size=10_240,
    ),
}
TEXT: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        global_head_dim=128,
        vocab_size=2304,
        vocab_size_per_layer_input=2304,
        max_position_embeddings=32_768,
    ),
    "e2b": dict(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        layer_types=[*["sliding_attention"] * 4, "full_attention"] * 7,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        global_head_dim=512,
        vocab_size=262_144,
        vocab_size_per_layer_input=262_144,
        max_position_embeddings=131_072,
    ),
}
PER_LAYER: dict[Size, dict[str, Any]] = {
    "tiny": dict(hidden_size_per_layer_input=16, num_kv_shared_layers=2, use_double_wide_mlp=True),
    "e2b": dict(hidden_size_per_layer_input=256, num_kv_shared_layers=20, use_double_wide_mlp=True),
}
"""What the small models have."""

# The released form without tools and thinking: a system message is a turn of its own.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- elif part['type'] in ('image', 'image_url') -%}
                {{- '<|image|>' -}}
            {%- elif part['type'] in ('video', 'video_url') -%}
                {{- '<|video|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def write_gemma4_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    large: bool = False,
    sliding_window: int | None = None,
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a Gemma 4 checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (3 million parameters) or "e2b" (the shapes of Gemma 4 E2B).
        large: as the models from 26B on, see above.
        sliding_window: positions that a token of a layer with a window sees; None for 128 of "tiny" and the released
            512. An image of more tokens than that is no longer seen whole by each of them.
        weights, seed, shards, dtype: as for `write_llava_checkpoint`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = gemma4_config(size, dtype, large=large, sliding_window=sliding_window)
    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=2, eos_token_id=[1, TOKEN_ID[END]], pad_token_id=0).save_pretrained(directory)
    image_processor = Gemma4ImageProcessor(max_soft_tokens=MOST_TOKENS[size])
    Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=image_processor,
        tokenizer=gemma_tokenizer(SPECIAL_TOKENS, NAMED_TOKENS),
        video_processor=Gemma4VideoProcessor(),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=MOST_TOKENS[size],
    ).save_pretrained(directory)
    image_processor.save_pretrained(directory)  # transformers 5 puts it into processor_config.json; released have both
    if weights:
        with torch.device("meta"):
            model = Gemma4ForConditionalGeneration(config)
        write_weights(
            directory,
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"},
            rename=str,
            weight=lambda name, shape: _random_weight(name, shape, seed),
            shards=shards,
            dtype=getattr(torch, dtype),
        )
    return directory


def gemma4_config(
    size: Size, dtype: DType = "float32", *, large: bool = False, sliding_window: int | None = None
) -> Gemma4Config:
    """The configuration of Gemma 4 in a size; the other arguments as for `write_gemma4_checkpoint`."""
    ways: dict[str, Any] = PER_LAYER[size]
    if large:
        ways = dict(
            use_bidirectional_attention="vision",
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
        )
    return Gemma4Config(
        architectures=["Gemma4ForConditionalGeneration"],
        vision_config=dict(
            default_output_length=MOST_TOKENS[size], use_clipped_linears=not large, standardize=large, **VISION[size]
        ),
        text_config=dict(
            sliding_window=sliding_window or {"tiny": 128, "e2b": 512}[size],
            final_logit_softcapping=30.0,
            **ways,
            **TEXT[size],
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
        dtype=dtype,
    )


def _random_weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    values = noise(name, shape, seed)
    if name.endswith(("input_min", "output_min")):
        return torch.full(shape, -2.0)
    if name.endswith(("input_max", "output_max")):
        return torch.full(shape, 2.0)
    if name.endswith(("layer_scalar", "std_scale")):
        return values.mul_(0.1).add_(1.0)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return values.mul_(0.1).add_(1.0).mul_(shape[0] ** -0.25)  # attention divides by nothing
    if "norm" in name:
        values.mul_(0.1).add_(1.0)
        return language_weight(name, values) if "language_model" in name else values
    if "embed_tokens" in name:
        return language_weight(name, values)
    if name.endswith("std_bias") or "position_embedding" in name:
        return values
    return values.mul_(1.0 / math.sqrt(math.prod(shape[1:])))

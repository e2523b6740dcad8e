"""Gemma 3 checkpoints made on the spot, laid out like `google/gemma-3-4b-it`. See `checkpoint`.

`size="tiny"` is the real architecture with small dimensions and seeded random weights: a SigLIP encoder whose 4 x 4
patches are averaged into a token, layers with a sliding window between those without, and attention in both directions
within an image. "4b" has the shapes of Gemma 3 4B for vLLM's `load_format="dummy"`; only its token ids are those of our
tokenizer. Weights come under the released names.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, processors
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from vllm_vtprune_checkpoints.llava import RENAMES, TRAINED_TOKENS, DType, random_weight, trained_tokenizer
from vllm_vtprune_checkpoints.weights import Shape, renamed, write_weights

Size = Literal["tiny", "4b"]

PAD, EOS, BOS, UNK = FIRST_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as in every Gemma
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")  # each one token, as in Gemma: vLLM asks for them by name
START, END = "<start_of_turn>", "<end_of_turn>"
NAMED_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
SPECIAL_TOKENS = (START, END, *NAMED_TOKENS.values())
TOKEN_ID = {token: TRAINED_TOKENS + index for index, token in enumerate((*NEWLINES, *SPECIAL_TOKENS))}

VISION: dict[Size, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=448,
        patch_size=14,
    ),
    "4b": dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=896,
        patch_size=14,
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
        query_pre_attn_scalar=64,
        sliding_window=128,
        sliding_window_pattern=3,
        vocab_size=2304,
        max_position_embeddings=32_768,
    ),
    "4b": dict(
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        sliding_window_pattern=6,
        vocab_size=262_208,
        max_position_embeddings=131_072,
    ),
}
TOKENS_PER_IMAGE: dict[Size, int] = {"tiny": 64, "4b": 256}

# The released form: a system message opens the first turn of the user.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set text = message['content'] if message['content'] is string else message['content'][0]['text'] -%}
        {%- set system.text = text + '\\n\\n' -%}
    {%- else -%}
        {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
        {{- system.text -}}
        {%- set system.text = '' -%}
        {%- if message['content'] is string -%}
            {{- message['content'] | trim -}}
        {%- elif message['content'] is not none -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] == 'text' -%}
                    {{- part['text'] | trim -}}
                {%- elif part['type'] in ('image', 'image_url') -%}
                    {{- '<start_of_image>' -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<end_of_turn>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def write_gemma3_checkpoint(
    directory: str | os.PathLike[str],
    *,
    size: Size = "tiny",
    weights: bool = True,
    seed: int = 0,
    shards: int = 1,
    dtype: DType = "float32",
) -> Path:
    """Write a Gemma 3 checkpoint into `directory` and return its path.

    Args:
        size: "tiny" (3 million parameters, 64 tokens an image) or "4b" (the shapes of Gemma 3 4B, 256 tokens).
        weights, seed, shards, dtype: as for `write_llava_checkpoint`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = gemma3_config(size, dtype)
    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=2, eos_token_id=[1, TOKEN_ID[END]], pad_token_id=0).save_pretrained(directory)
    square = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    image_processor = Gemma3ImageProcessor(size=square)
    Gemma3Processor(
        image_processor=image_processor,
        tokenizer=gemma_tokenizer(SPECIAL_TOKENS, NAMED_TOKENS),
        chat_template=CHAT_TEMPLATE,
        image_seq_length=config.mm_tokens_per_image,
    ).save_pretrained(directory)
    image_processor.save_pretrained(directory)  # transformers 5 puts it into processor_config.json; released have both
    if weights:
        with torch.device("meta"):
            model = Gemma3ForConditionalGeneration(config)
        write_weights(
            directory,
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"},
            rename=lambda name: renamed(name, RENAMES["vllm"]),
            weight=lambda name, shape: _random_weight(name, shape, seed),
            shards=shards,
            dtype=getattr(torch, dtype),
        )
    return directory


def gemma3_config(size: Size, dtype: DType = "float32") -> Gemma3Config:
    """The configuration of Gemma 3 in a size, with the token ids of `gemma_tokenizer`."""
    return Gemma3Config(
        architectures=["Gemma3ForConditionalGeneration"],
        vision_config=dict(vision_use_head=False, **VISION[size]),
        text_config=dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
            **TEXT[size],
        ),
        mm_tokens_per_image=TOKENS_PER_IMAGE[size],
        boi_token_index=TOKEN_ID["<start_of_image>"],
        eoi_token_index=TOKEN_ID["<end_of_image>"],
        image_token_index=TOKEN_ID["<image_soft_token>"],
        eos_token_id=[1, TOKEN_ID[END]],
        dtype=dtype,
    )


def gemma_tokenizer(special_tokens: tuple[str, ...], named_tokens: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer with `FIRST_TOKENS` first, and `NEWLINES` and the special tokens from `TRAINED_TOKENS` on.

    Args:
        special_tokens: in the order of their ids.
        named_tokens: those that the processor asks for by name.
    """
    tokenizer = trained_tokenizer(list(FIRST_TOKENS))
    tokenizer.add_tokens([f"<unused_{index}>" for index in range(tokenizer.get_vocab_size(), TRAINED_TOKENS)])
    tokenizer.add_tokens([AddedToken(newline, normalized=False) for newline in NEWLINES])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        extra_special_tokens=dict(named_tokens),
        model_max_length=131_072,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def language_weight(name: str, values: torch.Tensor) -> torch.Tensor:
    """Random weights of a Gemma's language model, made to let the next token depend on every token.

    Args:
        name: of the tensor.
        values: normal ones for a table of embeddings; what they would be in other models otherwise. Overwritten.
    """
    if "embed_tokens" in name:
        return values.div_(math.sqrt(values.shape[1]))  # multiplied by that when read
    if "post_" in name:
        return values.add_(3.0)  # against the embedding, of which the output's table is the same
    if name.endswith("language_model.norm.weight"):
        return values.add_(2.0)
    return values


def _random_weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    values = random_weight(name, shape, seed)
    if "vision_tower" not in name:
        return language_weight(name, values.sub_(1.0) if "norm" in name else values)  # norms multiply by 1 + weight
    if "position_embedding" in name or "patch_embedding.weight" in name:
        return values.mul_(3.0)  # patches differ more, because the mean of 16 differs less
    return values

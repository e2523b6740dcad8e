"""Gemma 3 checkpoints, laid out like `google/gemma-3-4b-it`.

A SigLIP encoder whose 4 x 4 patches are averaged into a token, layers with a sliding window between those without, and
attention in both directions within an image.
"""

import math
from collections.abc import Mapping

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from vllm_vtprune_checkpoints.llava import NAMES
from vllm_vtprune_checkpoints.tokens import chat_template, ids_of, make_tokenizer
from vllm_vtprune_checkpoints.writing import Checkpoint, Shape, Writer, random_weight, widths

PAD, EOS, BOS, UNK = FIRST_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0 to 3, as in every Gemma
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")  # each one token, as in Gemma: vLLM asks for them by name
START, END = "<start_of_turn>", "<end_of_turn>"
NAMED_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
SPECIAL_TOKENS = (START, END, *NAMED_TOKENS.values())
TOKEN_ID = ids_of((*NEWLINES, *SPECIAL_TOKENS))

VISION = {"tiny": widths(128, 256, 4, 4, image_size=448), "4b": widths(1152, 4304, 27, 16, image_size=896)}
TEXT = {
    "tiny": widths(256, 512, 3, 4, 2, 2304, 32_768, head_dim=64, sliding_window=128, sliding_window_pattern=3),
    "4b": widths(2560, 10_240, 34, 8, 4, 262_208, 131_072, head_dim=256, sliding_window=1024, sliding_window_pattern=6),
}
TOKENS_PER_IMAGE = {"tiny": 64, "4b": 256}

# The released form: a system message opens the first turn of the user.
_BEFORE = """\
{{- bos_token -}}
{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set content = messages[0]['content'] -%}
    {%- set system = (content if content is string else content[0]['text']) + '\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
"""
_ROLE = "('model' if message['role'] == 'assistant' else message['role'])"


def gemma3(size: str) -> Checkpoint:
    """What a checkpoint holds; `size`: "tiny" (3 million parameters) or "4b" (the shapes of Gemma 3 4B)."""
    config = Gemma3Config(
        vision_config=dict(vision_use_head=False, patch_size=14, **VISION[size]),
        text_config=dict(
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
            query_pre_attn_scalar=TEXT[size]["head_dim"],
            **TEXT[size],
        ),
        mm_tokens_per_image=TOKENS_PER_IMAGE[size],
        boi_token_index=TOKEN_ID["<start_of_image>"],
        eoi_token_index=TOKEN_ID["<end_of_image>"],
        image_token_index=TOKEN_ID["<image_soft_token>"],
        eos_token_id=[1, TOKEN_ID[END]],
    )
    side = config.vision_config.image_size
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": side, "width": side}),
        tokenizer=gemma_tokenizer(SPECIAL_TOKENS, NAMED_TOKENS),
        chat_template=chat_template(
            before=_BEFORE,
            start=f"'<start_of_turn>' + {_ROLE} + '\\n' + (system if loop.first else '')",
            end="'<end_of_turn>\\n'",
            prompt="<start_of_turn>model\\n",
            image="<start_of_image>",
            trim=True,
        ),
        image_seq_length=config.mm_tokens_per_image,
    )
    return Checkpoint(Gemma3ForConditionalGeneration, config, processor, NAMES, weight=_weight, ends=[END])


def gemma_tokenizer(special_tokens: tuple[str, ...], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer with `FIRST_TOKENS` first, and `NEWLINES` before the special tokens."""
    return make_tokenizer(
        special_tokens,
        first=FIRST_TOKENS,
        plain=NEWLINES,
        named=named,
        unk=UNK,
        bos=BOS,
        eos=EOS,
        pad=PAD,
        max_length=131_072,
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


def _weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    values = random_weight(name, shape, seed)
    if "vision_tower" not in name:
        return language_weight(name, values.sub_(1.0) if "norm" in name else values)  # norms multiply by 1 + weight
    if "position_embedding" in name or "patch_embedding.weight" in name:
        return values.mul_(3.0)  # patches differ more, because the mean of 16 differs less
    return values


write_gemma3_checkpoint = Writer(gemma3, TEXT)

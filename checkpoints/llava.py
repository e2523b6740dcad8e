"""LLaVA checkpoints, laid out like `llava-hf/llava-1.5-7b-hf`."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vllm_vtprune_checkpoints.tokens import TRAINED_TOKENS, make_tokenizer
from vllm_vtprune_checkpoints.writing import INSIDE, Checkpoint, DType, Writer, widths

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
UNK, BOS, EOS = FIRST_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as in LLaMA
NAMED_TOKENS = {"image_token": IMAGE_TOKEN}
NAMES = (*INSIDE, (r"^vision_tower\.", "vision_tower.vision_model."))

# "small" is just large enough that, on a CPU, prefill costs much more than everything else. The widths bound the rank
# of the features (128) and of the embeddings (256), so those of "tiny" are not smaller.
VISION = {
    "tiny": widths(128, 256, 4, 4, projection_dim=128),
    "small": widths(256, 1024, 6, 4, projection_dim=256),
    "7b": widths(1024, 4096, 24, 16, projection_dim=768),
}
TEXT = {
    "tiny": widths(256, 512, 2, 4, 4, 2048, 4096),
    "small": widths(1024, 2816, 8, 16, 16, 2048, 4096),
    "7b": widths(4096, 11008, 32, 32, 32, 32064, 4096),
}
IMAGE_TOKEN_ID = {"tiny": TRAINED_TOKENS, "small": TRAINED_TOKENS, "7b": 32000}

# The form of llava-hf/llava-1.5-7b-hf: the images of a message first, then its text. `| string` keeps numbers harmless.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}
        {{- message['role'].upper() + ': ' -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] + ' ' -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- '<image>\\n' -}}
            {%- endif -%}
        {%- endfor -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] + ' ' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def llava(size: str, *, siglip: bool = False, feature_layer: int | list[int] = -2) -> Checkpoint:
    """What a checkpoint holds.

    Args:
        size: "tiny" (3 million parameters), "small" (some 110 million) or "7b" (the shapes of LLaVA-1.5-7B).
        siglip: with an encoder of SigLIP instead of CLIP: no CLS token, and images are scaled without their ratio.
        feature_layer: of the encoder, that feeds the connector; or several.
    """
    encoder: dict[str, Any] = dict(image_size=336, patch_size=14, **VISION[size])
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **encoder) if siglip else CLIPVisionConfig(**encoder),
        text_config=llama(size),
        image_token_index=IMAGE_TOKEN_ID[size],
        image_seq_length=576,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    return _checkpoint(config, llava_tokenizer(IMAGE_TOKEN_ID[size]))


def _checkpoint(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    has_cls = isinstance(config.vision_config, CLIPVisionConfig)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        if has_cls
        else SiglipImageProcessor(size=square),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_cls),
        chat_template=CHAT_TEMPLATE,
    )
    return Checkpoint(LlavaForConditionalGeneration, config, processor, NAMES)


def llama(size: str, **others: Any) -> LlamaConfig:
    """The config of the language model in a size."""
    return LlamaConfig(
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=IMAGE_TOKEN_ID[size] + 1,
        **TEXT[size] | others,
    )


def llava_tokenizer(
    begin: int = TRAINED_TOKENS, *, base: Tokenizer | None = None, plain: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of LLaVA; the arguments are those of `make_tokenizer`."""
    return make_tokenizer(
        (IMAGE_TOKEN, PAD_TOKEN),
        base=base,
        first=FIRST_TOKENS,
        plain=plain,
        begin=begin,
        named=NAMED_TOKENS,
        unk=UNK,
        bos=BOS,
        eos=EOS,
        pad=PAD_TOKEN,
        max_length=4096,
    )


def save_llava_checkpoint(
    directory: str | os.PathLike[str],
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: DType = "bfloat16",
) -> Path:
    """Write a model that was trained, with its tokenizer, into `directory` and return its path."""
    config = copy.deepcopy(model.config)
    config.vision_config.dtype = config.text_config.dtype = dtype
    state = model.state_dict()
    return _checkpoint(config, tokenizer).write(
        Path(directory), lambda name, shape: state[name].detach().cpu().contiguous(), dtype=dtype
    )


write_llava_checkpoint = Writer(llava, TEXT)

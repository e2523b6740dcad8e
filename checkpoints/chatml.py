"""What checkpoints share whose prompts are written in ChatML: Qwen2.5-VL and InternVL."""

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from vllm_vtprune_checkpoints.llava import TRAINED_TOKENS, trained_tokenizer

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- 'IMAGE' -}}
            {%- elif part['type'] in ('video', 'video_url') -%}
                {{- 'VIDEO' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' -}}
{%- endif -%}
"""


def chat_template(*, image: str, video: str, system: str | None = None) -> str:
    """A Jinja template that writes messages in ChatML, their parts in the order in which they come.

    Args:
        image: what stands for an image, as within a Jinja string.
        video: the same for a video.
        system: the system turn of a prompt that brings none.
    """
    turn = "" if system is None else _SYSTEM.replace("SYSTEM", system)
    return turn + _TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def chatml_tokenizer(
    special_tokens: Sequence[str], *, max_length: int, named_tokens: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens have the ids from `TRAINED_TOKENS` on, in their order.

    Args:
        special_tokens: `END_OF_TEXT`, `START` and `END` among them.
        max_length: tokens that the model takes.
        named_tokens: those that the processor asks for by name; None where it knows them by themselves.
    """
    tokenizer = trained_tokenizer([])
    tokenizer.add_tokens([f"<unused_{index}>" for index in range(tokenizer.get_vocab_size(), TRAINED_TOKENS)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=list(special_tokens) if named_tokens is None else dict(named_tokens),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )

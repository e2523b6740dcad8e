"""Tokenizers and chat templates of checkpoints made on the spot."""

from collections.abc import Mapping, Sequence
from functools import cache
from string import Template

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vllm_vtprune_checkpoints import words

TRAINED_TOKENS = 2046  # enough for every word of the corpus to be one token
END_OF_TEXT, START, END = CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def ids_of(tokens: Sequence[str]) -> dict[str, int]:
    """The ids of special tokens, from `TRAINED_TOKENS` on."""
    return {token: TRAINED_TOKENS + index for index, token in enumerate(tokens)}


CHATML_IDS = {"bos_token_id": ids_of(CHATML)[END_OF_TEXT], "eos_token_id": ids_of(CHATML)[END]}
"""Of a config, for special tokens that begin with `CHATML`."""


@cache
def _trained(special_tokens: tuple[str, ...]) -> str:
    """A byte-level BPE with `TRAINED_TOKENS` tokens, the special ones first: any text survives the round trip. As JSON.

    Trained once in a process: training takes a third of a second.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_TOKENS,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words.sentences(), trainer)
    return tokenizer.to_str()


def make_tokenizer(
    special_tokens: Sequence[str],
    *,
    base: Tokenizer | None = None,
    first: Sequence[str] = (),
    plain: Sequence[str] = (),
    begin: int = TRAINED_TOKENS,
    named: Mapping[str, str] | None = None,
    unk: str | None = None,
    bos: str | None = None,
    eos: str = END,
    pad: str = END_OF_TEXT,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose `plain` and special tokens have the ids from `begin` on, in their order.

    Args:
        special_tokens: those.
        base: what is added to; None: a trained byte-level BPE, whose first tokens are `first`.
        first: special tokens with the ids from 0 on.
        plain: tokens that are not special.
        named: the special tokens that the processor asks for by name; None where it knows them by themselves.
        unk, bos, eos, pad: of the special tokens. Every text begins with `bos`, if there is one.
        max_length: tokens that the model takes.
    """
    tokenizer = Tokenizer.from_str(_trained(tuple(first))) if base is None else base
    tokenizer.add_tokens([f"<unused_{index}>" for index in range(tokenizer.get_vocab_size(), begin)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=list(special_tokens) if named is None else dict(named),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# vLLM sees from the loop over the content that messages come as lists of parts; plain strings are for other callers.
_TEMPLATE = Template("""\
$before{%- for message in messages -%}
    {{- $start -}}
    {%- if message['content'] is string -%}
        {{- message['content']$filter -}}
    {%- elif message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ('image', 'image_url') -%}
                {{- '$image' -}}
            {%- elif part['type'] in ('video', 'video_url') -%}
                {{- '$video' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text']$filter -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- $end -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '$prompt' -}}
{%- endif -%}
""")


def chat_template(
    *, start: str, end: str = "''", prompt: str, image: str, video: str = "", before: str = "", trim: bool = False
) -> str:
    """A Jinja template that writes messages one after the other, their parts in the order in which they come.

    Args:
        start, end: what stands before and after the content of `message`, as Jinja expressions.
        prompt: what asks for an answer, as within a Jinja string; as are the next two.
        image, video: what stands for one.
        before: Jinja before the first message.
        trim: whether space around a text is left out.
    """
    return _TEMPLATE.substitute(
        start=start, end=end, prompt=prompt, image=image, video=video, before=before, filter=" | trim" if trim else ""
    )


def chatml_template(*, image: str, video: str, system: str | None = None) -> str:
    """`chat_template` of ChatML; `system` is the system turn of a prompt that brings none."""
    turn = "{{- '<|im_start|>system\\n%s<|im_end|>\\n' if messages[0]['role'] != 'system' else '' -}}\n"
    return chat_template(
        start="'<|im_start|>' + message['role'] + '\\n'",
        end="'<|im_end|>\\n'",
        prompt="<|im_start|>assistant\\n",
        image=image,
        video=video,
        before="" if system is None else turn % system,
    )

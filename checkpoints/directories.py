"""Directories of tiny random checkpoints: what makers share whose families bring tokens of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from vllm_vtprune_checkpoints.llava import TRAINED_TOKENS, trained_tokenizer
from vllm_vtprune_checkpoints.weights import Shape, noise, write_weights


def write_directory(
    directory: Path,
    config: Any,
    processor: ProcessorMixin,
    *,
    shapes: Mapping[str, Shape] | None,
    rename: Callable[[str], str] = str,
    texture: float,
    seed: int,
    shards: int,
) -> Path:
    """Write a checkpoint into `directory` and return its path.

    Args:
        config: of the model; its `dtype` is that of the weights.
        processor: with a tokenizer, whose `eos_token` and `pad_token` generation uses, and an `image_processor`.
        shapes: of the weights; None for a directory without, for `load_format="dummy"`.
        rename: from the names in `shapes` to those in the files.
        texture, seed: as for `random_weight`.
        shards: number of weight files; more than one come with an index.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, not {shards}")
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    tokenizer = processor.tokenizer
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(directory)
    processor.save_pretrained(directory)
    # transformers 5 puts these into processor_config.json; released checkpoints have files for them
    for part in ("image_processor", "video_processor"):
        if hasattr(processor, part):
            getattr(processor, part).save_pretrained(directory)
    if shapes is not None:
        write_weights(
            directory,
            shapes,
            rename=rename,
            weight=lambda name, shape: random_weight(name, shape, seed, texture),
            shards=shards,
            dtype=config.dtype,
        )
    return directory


def shapes_of(model_class: type[PreTrainedModel], config: Any) -> dict[str, Shape]:
    """The shapes of a model's weights by their names in transformers' module, without those of a tied `lm_head`."""
    with torch.device("meta"):
        model = model_class(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else ()
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items() if name not in tied}


def tokenizer_with(
    special_tokens: Sequence[str],
    *,
    first: Sequence[str] = (),
    bos: str | None = None,
    eos: str,
    pad: str,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens have the ids from `TRAINED_TOKENS` on, in their order.

    Args:
        special_tokens: those.
        first: special tokens with the ids from 0 on.
        bos, eos, pad: of the special tokens.
        max_length: tokens that the model takes.
    """
    tokenizer = trained_tokenizer(list(first))
    tokenizer.add_tokens([f"<unused_{index}>" for index in range(tokenizer.get_vocab_size(), TRAINED_TOKENS)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=list(special_tokens),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def random_weight(name: str, shape: Shape, seed: int, texture: float) -> torch.Tensor:
    """A weight under which patches look different and the next token depends on all of them.

    Args:
        name, seed: the numbers depend on them alone.
        shape: with one dimension, that of a norm where the name ends in `.weight`, else of a bias.
        texture: how strongly patches differ.
    """
    values = noise(name, shape, seed)
    if len(shape) == 1:
        return values.mul_(0.1).add_(1.0 if name.endswith(".weight") else 0.0)
    if "embed_tokens" in name:
        return values
    if "position_embedding" in name:
        return values.mul_(0.03)
    gain = 2.0 if "lm_head" in name else 1.0  # attention stays even, so each token counts
    if shape[1] == 3:  # colours: look for texture more than for brightness
        values -= values.mean(dim=tuple(range(2, len(shape))), keepdim=True).mul_(0.7)
        gain = texture
    return values.mul_(gain / math.sqrt(math.prod(shape[1:])))

"""What the makers of checkpoints share: a family's says its config, its processor and its names, `Writer` the rest.

`size="tiny"` is the real architecture with small dimensions and seeded random weights. Its answers mean nothing, but
they depend on every visual token, so it tells a correct path through the engine from a wrong one. The other sizes have
released shapes, for vLLM's `load_format="dummy"`; only their token ids are those of our tokenizers. Directories are
laid out, and weights named, like released ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel

Shape = tuple[int, ...]
DType = Literal["float32", "bfloat16"]
Names = tuple[tuple[str, str], ...]

INSIDE: Names = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
"""`Checkpoint.names` where the released language model is a module with a head of its own."""


def widths(*values: int, **others: Any) -> dict[str, Any]:
    """Dimensions by their names in configs.

    Args:
        values: hidden size, that within an MLP, layers, heads; of a language model also key-value heads, tokens of the
            vocabulary, positions.
        others: by their names.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip((*names, "vocab_size", "max_position_embeddings"), values, strict=False)) | others


def noise(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """Normal random numbers that depend on the tensor's name and the seed alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))


def random_weight(name: str, shape: Shape, seed: int, *, texture: float = 2.0, attention: float = 2.0) -> torch.Tensor:
    """A weight under which patches look different and the next token depends on all of them.

    Args:
        name, seed: the numbers depend on them alone.
        shape: with one dimension, that of a norm where the name ends in `.weight`.
        texture: how strongly patches differ.
        attention: how strongly queries and keys differ; with 1, attention stays even, so each token counts.
    """
    values = noise(name, shape, seed)
    if name.endswith("bias"):
        return values.mul_(0.1)
    if len(shape) == 1 and name.endswith(".weight"):
        return values.mul_(0.1).add_(1.0)
    if len(shape) == 1 or "embed_tokens" in name or "cls_token" in name:
        return values
    if "position_embedding" in name:
        return values.mul_(0.03)
    gain = 2.0 if "lm_head" in name else attention if "q_proj" in name or "k_proj" in name else 1.0
    if shape[1] == 3:  # colours: look for texture more than for brightness
        values -= values.mean(dim=tuple(range(2, len(shape))), keepdim=True).mul_(0.7)
        gain = texture
    return values.mul_(gain / math.sqrt(math.prod(shape[1:])))


even_weight = partial(random_weight, attention=1.0)


def released(name: str, names: Names) -> str:
    """The name in the file of a tensor that the model calls `name`; `names` as in `Checkpoint`."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds.

    Attributes:
        model: class of transformers whose weights are written.
        config: what config.json holds, but for `dtype` and, where it says none, `architectures`.
        processor: of transformers, with a tokenizer; or the tokenizer alone.
        names: (regular expression, replacement), applied one after the other to the names of the tensors in the model.
            Those that get the same name are joined along their first dimension.
        weight: makes a random tensor of its name in the model, its shape and a seed.
        model_config: of the model, where config.json holds another.
        split: the tensors to write, by name and shape, of those in the model, where they differ.
        ends: tokens that end an answer, beside the tokenizer's `eos_token`.
    """

    model: type[PreTrainedModel]
    config: Any
    processor: Any
    names: Names = ()
    weight: Callable[[str, Shape, int], torch.Tensor] = random_weight
    model_config: Any = None
    split: Callable[[Mapping[str, Shape]], dict[str, Shape]] = dict
    ends: Sequence[str] = ()

    def shapes(self) -> dict[str, Shape]:
        """The tensors to write, by the names that `names` are applied to; a tied `lm_head` is left out."""
        with torch.device("meta"):
            model = self.model(self.model_config or self.config)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else ()
        return self.split({name: tuple(w.shape) for name, w in model.state_dict().items() if name not in tied})

    def write(
        self,
        directory: Path,
        weight: Callable[[str, Shape], torch.Tensor] | None,
        *,
        dtype: DType,
        shards: int = 1,
    ) -> Path:
        """Write into `directory` and return it.

        Args:
            weight: makes a tensor of its name in the model and its shape; None for a directory without weights.
            dtype: of the weights.
            shards: number of weight files; more than one come with an index.
        """
        if shards < 1:
            raise ValueError(f"shards must be at least 1, not {shards}")
        directory.mkdir(parents=True, exist_ok=True)
        self.config.dtype = getattr(torch, dtype)
        self.config.architectures = self.config.architectures or [self.model.__name__]
        self.config.save_pretrained(directory)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(self.ends))]
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends if self.ends else ends[0],
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(directory)
        self.processor.save_pretrained(directory)
        # transformers 5 puts these into processor_config.json; released checkpoints have files for them
        for part in ("image_processor", "video_processor"):
            if hasattr(self.processor, part):
                getattr(self.processor, part).save_pretrained(directory)
        if weight is not None:
            self._write_weights(directory, weight, getattr(torch, dtype), shards)
        return directory

    def _write_weights(
        self, directory: Path, weight: Callable[[str, Shape], torch.Tensor], dtype: torch.dtype, shards: int
    ) -> None:
        shapes = self.shapes()
        parts: dict[str, list[str]] = {}
        for name in shapes:
            parts.setdefault(released(name, self.names), []).append(name)
        sizes = [dtype.itemsize * sum(math.prod(shapes[part]) for part in joined) for joined in parts.values()]
        before = accumulate(sizes, initial=0)
        shard_of = {name: size * shards // sum(sizes) for name, size in zip(parts, before, strict=False)}
        files: dict[str, str] = {}
        for shard in range(shards):
            file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            tensors: dict[str, torch.Tensor] = {}
            for name in (name for name in parts if shard_of[name] == shard):
                made = [weight(part, shapes[part]) for part in parts[name]]
                tensors[name] = (torch.cat(made) if len(made) > 1 else made[0]).to(dtype)
            save_file(tensors, directory / file, metadata={"format": "pt"})
            (directory / file).chmod(0o644)  # safetensors writes files that only their owner can read
            files |= dict.fromkeys(tensors, file)
        if shards > 1:
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(files.items()))}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@dataclass(frozen=True)
class Writer:
    """Writes a family's random checkpoints: what every `write_<family>_checkpoint` is.

    Attributes:
        make: makes what a checkpoint holds of a size and the family's own options.
        sizes: that it knows.
        dtype: of the weights where none is asked for.
    """

    make: Callable[..., Checkpoint]
    sizes: Collection[str]
    dtype: DType = "float32"

    def __call__(
        self,
        directory: str | os.PathLike[str],
        *,
        size: str = "tiny",
        weights: bool = True,
        seed: int = 0,
        shards: int = 1,
        dtype: DType | None = None,
        **options: Any,
    ) -> Path:
        """Write a checkpoint into `directory` and return its path.

        Args:
            size: one of `sizes`.
            weights: without, everything but the weights, for `load_format="dummy"`.
            seed: each tensor depends on this and on its name, so that shards hold the same numbers.
            shards: number of weight files; more than one come with an index.
            dtype: of the weights, and the one that the config announces.
            options: of the family's maker.
        """
        if size not in self.sizes:
            raise ValueError(f"size must be one of {', '.join(self.sizes)}, not {size!r}")
        checkpoint = self.make(size, **options)
        return checkpoint.write(
            Path(directory),
            (lambda name, shape: checkpoint.weight(name, shape, seed)) if weights else None,
            dtype=dtype or self.dtype,
            shards=shards,
        )

"""Read rows of a language model's input embedding table from a checkpoint without loading the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_vtprune.vision_encoder import EncoderError

INDEX = "model.safetensors.index.json"
NAMES = ("embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight", "wte.weight")
"""Suffixes of the table's name in checkpoints."""
ROW_CACHE = 4096
"""Rows kept in memory: 32 MiB at d = 4096 in bfloat16."""


class TokenTable:
    """An input embedding table. Thread-safe.

    Args:
        read: a valid token id -> (dim,), in memory of its own.
        size, dim: shape of the table.
    """

    def __init__(self, read: Callable[[int], Tensor], size: int, dim: int) -> None:
        self._row = lru_cache(maxsize=ROW_CACHE)(read)
        self.size, self.dim = size, dim

    @classmethod
    def random(cls, size: int, dim: int, seed: int) -> TokenTable:
        """A random table, computed on access: rows from N(0, 0.02^2), determined by seed and id."""

        def row(token_id: int) -> Tensor:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + token_id) % 2**32)  # the seed has 32 bits
            return torch.randn(dim, generator=generator) * 0.02

        return cls(row, size, dim)

    @classmethod
    def of_checkpoint(cls, directory: Path, dim: int) -> TokenTable:
        """The table of a model directory of safetensors files.

        Args:
            directory: the model directory.
            dim: width of the table.

        Raises:
            EncoderError: the directory holds no floating-point table of that width, or files are missing or damaged.
        """
        candidates = [(path, name) for name, path in _files_of(directory).items() if name.endswith(NAMES)]
        if not candidates:
            raise EncoderError(f"{directory} holds no embedding table of a language model (…{', …'.join(NAMES)})")
        problems = []
        for path, name in candidates:
            table = _slice_of(path, name)
            shape, dtype = table.get_shape(), table.get_dtype()
            if len(shape) == 2 and shape[1] == dim and dtype in ("F64", "F32", "F16", "BF16"):
                return cls(partial(_row, table), shape[0], dim)
            problems.append(f"{name} is {dtype} of shape {tuple(shape)}")
        raise EncoderError(f"{directory}: {'; '.join(problems)}; expected floating-point numbers of shape (n, {dim})")

    def rows(self, token_ids: Sequence[int]) -> Tensor:
        """(M, dim) rows of ``token_ids``, in order, on the CPU, in the checkpoint's dtype.

        Raises:
            ValueError: an id is out of range.
        """
        invalid = [i for i in token_ids if not 0 <= i < self.size]
        if invalid:
            raise ValueError(f"token id {invalid[0]} is not in the embedding table; expected 0 to {self.size - 1}")
        if not token_ids:
            return torch.empty(0, self.dim)
        return torch.stack([self._row(i) for i in token_ids])


def _row(table: Any, token_id: int) -> Tensor:
    row: Tensor = table[token_id : token_id + 1][0]
    return row.clone()  # of a view of the file


def _files_of(directory: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint, by tensor name."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: directory / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EncoderError(f"{index} is not a safetensors index: {error!r}") from error
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise EncoderError(f"{directory} holds no *.safetensors, which the token embeddings are read from")
    return {name: path for path in paths for name in sorted(_opened(path).keys())}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{path} cannot be read as safetensors: {error}") from error


def _slice_of(path: Path, name: str) -> Any:
    try:
        return _opened(path).get_slice(name)
    except SafetensorError as error:
        raise EncoderError(f"{path} does not hold {name!r}, which {INDEX} places there: {error}") from error

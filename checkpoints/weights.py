"""Writing seeded random weights as the safetensors files of a checkpoint."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

Shape = tuple[int, ...]


def write_weights(
    directory: Path,
    shapes: Mapping[str, Shape],
    *,
    rename: Callable[[str], str],
    weight: Callable[[str, Shape], torch.Tensor],
    shards: int,
    dtype: torch.dtype,
) -> None:
    """Write a model's weights into `directory`.

    Args:
        shapes: of the model's tensors, by their names in the module.
        rename: from those names to the ones in the files.
        weight: makes a tensor of a name and a shape.
        shards: number of files; more than one come with an index.
        dtype: of the weights in the files.
    """
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    shard_of: dict[str, int] = {}
    written = 0
    for name, shape in shapes.items():
        shard_of[name] = min(shards - 1, written * shards // total)
        written += math.prod(shape) * dtype.itemsize

    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        tensors = {
            rename(name): weight(name, shapes[name]).to(dtype)
            for name, its_shard in shard_of.items()
            if its_shard == shard
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors writes files that only their owner can read
        weight_map |= dict.fromkeys(tensors, file)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def renamed(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """The name with the first of the prefixes (old, new) that it has replaced."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def noise(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """Normal random numbers that depend on the tensor's name and the seed alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7])))

"""Reading a tower's tensors from a model directory of safetensors files, and filling a tower with random ones.

Checkpoints of one model exist under several naming schemes. A tower names tensors as its own module does, and an alias
table `{prefix: (stored prefix, ...)}` says how the files may call them, most usual first.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["Aliases", "CheckpointReader", "TowerError", "fill_random", "load_into", "random_values"]

Aliases = Mapping[str, tuple[str, ...]]

INDEX = "model.safetensors.index.json"
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})  # as safetensors headers spell them
QUANTISED_SUFFIXES = ("qweight", "weight_packed")  # stored in place of `weight`
SHOWN = 4  # names listed in an error message


class TowerError(RuntimeError):
    """The vision tower cannot be built: the model is not supported, or its files are incomplete or do not fit."""


class CheckpointReader:
    """The tensors of a model directory, by canonical name, read lazily. Safe to use from several threads.

    `directory`: holds one safetensors file, shards with `model.safetensors.index.json`, or several files without index.
    `aliases`: canonical prefix -> stored prefixes, in the order in which they are tried. A name under no prefix is
    looked up as it is.

    Raises TowerError where the directory holds no safetensors, a shard that the index names is missing, a file is
    damaged, or two files hold the same name.
    """

    def __init__(self, directory: Path, aliases: Aliases | None = None) -> None:
        self.directory = Path(directory)
        self._aliases = dict(aliases or {})
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self._files = self._read_index() if (self.directory / INDEX).is_file() else self._scan()

    def _read_index(self) -> dict[str, Path]:
        index = self.directory / INDEX
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TowerError(f"{index} is not a safetensors index: {error!r}") from error
        missing = [shard for shard in shards if not (self.directory / shard).is_file()]
        if missing:
            raise TowerError(
                f"{self.directory}: {len(missing)} of the {len(shards)} files that {INDEX} names are missing: "
                f"{_some(missing)}"
            )
        return {name: self.directory / shard for name, shard in weight_map.items()}

    def _scan(self) -> dict[str, Path]:
        if not self.directory.is_dir():
            raise TowerError(f"{self.directory} is not a directory; expected a local model directory")
        paths = sorted(self.directory.glob("*.safetensors"))
        if not paths:
            others = sorted(p.name for p in self.directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            found = f"only {_some(others)}" if others else "no weights at all"
            raise TowerError(f"{self.directory} holds {found}; the vision tower needs the weights as *.safetensors")
        files: dict[str, Path] = {}
        for path in paths:
            names: list[str] = self._open(path).keys()
            for name in names:
                if name in files:
                    raise TowerError(f"{self.directory}: both {files[name].name} and {path.name} hold {name!r}")
                files[name] = path
        return files

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise TowerError(f"{path} cannot be read as safetensors: {error}") from error
        return self._handles[path]

    def candidates(self, name: str) -> tuple[str, ...]:
        """The stored names under which canonical `name` is looked for, in order."""
        for prefix, stored in self._aliases.items():
            if name.startswith(prefix):
                return tuple(other + name.removeprefix(prefix) for other in stored)
        return (name,)

    def find(self, name: str) -> str | None:
        """The name under which the files hold canonical `name`, or None."""
        return next((stored for stored in self.candidates(name) if stored in self._files), None)

    def plan(self, expected: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """Map canonical names to stored ones, each stored tensor to at most one name. Reads headers only.

        `expected`: canonical name -> shape. Raises TowerError, listing the first few and how many, where tensors are
        missing, quantised, of another shape, or wanted twice.
        """
        found = {name: self.find(name) for name in expected}
        missing = [name for name, stored in found.items() if stored is None]
        quantised = [name for name in missing if self._is_quantised(name)]
        if quantised:
            raise self._quantised(quantised)
        if missing:
            raise TowerError(
                f"{self.directory}: {len(missing)} of the vision tower's {len(expected)} tensors are missing: "
                f"{_some(missing)} (tried for the first: {', '.join(self.candidates(missing[0]))})"
            )
        plan = {name: stored for name, stored in found.items() if stored is not None}

        twice = [stored for stored, count in Counter(plan.values()).items() if count > 1]
        if twice:
            raise TowerError(f"{self.directory}: the vision tower would read these tensors twice: {_some(twice)}")

        headers = {name: self._header(stored) for name, stored in plan.items()}
        quantised = [name for name, (_, dtype) in headers.items() if dtype not in FLOATING]
        if quantised:
            raise self._quantised(quantised)
        wrong = [
            f"{plan[name]} is {shape}, expected {tuple(expected[name])}"
            for name, (shape, _) in headers.items()
            if shape != tuple(expected[name])
        ]
        if wrong:
            raise TowerError(f"{self.directory}: {len(wrong)} tensors do not fit the model's config: {_some(wrong)}")
        return plan

    def get(self, name: str) -> Tensor:
        """The tensor of canonical `name`, on the CPU, in the file's dtype. It may share memory with the mapped file."""
        tensor: Tensor = self._call(self._stored(name), "get_tensor")
        return tensor

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """(M, d): rows `indices` of a table (n, d), in that order, repeats allowed. Reads no other row of the file.

        Raises ValueError for a row that is not there.
        """
        table = self._call(self._stored(name), "get_slice")
        count, width = table.get_shape()
        wrong = [index for index in indices if not 0 <= index < count]
        if wrong:
            raise ValueError(f"row {wrong[0]} of {name} does not exist: it has rows 0 to {count - 1}")
        out = torch.empty(len(indices), width, dtype=table[:0].dtype)
        for position, index in enumerate(indices):
            out[position] = table[index : index + 1][0]
        return out

    def _stored(self, name: str) -> str:
        stored = self.find(name)
        if stored is None:
            raise TowerError(f"{self.directory} holds no {name} (tried {', '.join(self.candidates(name))})")
        return stored

    def _header(self, stored: str) -> tuple[tuple[int, ...], str]:
        header = self._call(stored, "get_slice")
        return tuple(header.get_shape()), header.get_dtype()

    def _call(self, stored: str, method: str) -> Any:
        path = self._files[stored]
        with self._lock:
            try:
                return getattr(self._open(path), method)(stored)
            except SafetensorError as error:
                raise TowerError(f"{path} does not hold {stored!r}, which {INDEX} places there: {error}") from error

    def _is_quantised(self, name: str) -> bool:
        stems = (stored.removesuffix("weight") for stored in self.candidates(name) if stored.endswith(".weight"))
        return any(stem + suffix in self._files for stem in stems for suffix in QUANTISED_SUFFIXES)

    def _quantised(self, names: Sequence[str]) -> TowerError:
        return TowerError(
            f"{self.directory}: {len(names)} of the vision tower's tensors are quantised: {_some(names)}; "
            "expected floating-point weights (float64, float32, float16 or bfloat16) for the tower and the token table"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def load_into(module: nn.Module, reader: CheckpointReader, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give `module`, built on the meta device, its parameters from `reader`: every one, each read once.

    Copies out of the mapped file, so a later change of the file cannot reach the tower. Buffers are left alone.
    Raises TowerError as `CheckpointReader.plan` does.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    reader.plan(expected)
    _assign(module, {name: reader.get(name).to(device, dtype, copy=True) for name in expected})


def fill_random(module: nn.Module, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Give `module`, built on the meta device, the parameters that `random_values` draws."""
    _assign(module, {name: value.to(device) for name, value in random_values(module, dtype=dtype, seed=seed)})


def random_values(module: nn.Module, *, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Values for the parameters of `module`, by name, on the CPU: the same for the same seed and dtype on any device.

    Matrices have variance 1 / fan-in, so activations keep their scale through the depth of the tower and tokens stay
    distinct; norms are the identity and biases 0. Uniform rather than normal: 300M values in about a second.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = torch.empty(parameter.shape, dtype=dtype)
        if name.endswith("bias"):
            value.zero_()
        elif parameter.ndim == 1 and name.endswith("weight"):
            value.fill_(1)
        else:
            fan_in = parameter.numel() / (parameter.shape[0] if parameter.ndim > 1 else 1)
            bound = (3 / fan_in) ** 0.5  # a uniform law on [-b, b] has variance b^2 / 3
            value.uniform_(-bound, bound, generator=generator)
        yield name, value


def _assign(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()

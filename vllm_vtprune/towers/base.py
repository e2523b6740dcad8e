"""What every vision tower is, and how one is loaded for a model."""

import pkgutil
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.towers.weights import Aliases, CheckpointReader, TowerError, fill_random, load_into

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vllm_vtprune.plan import PruningPlan

__all__ = [
    "TOWERS",
    "PixelNorm",
    "TokenTable",
    "VisionTower",
    "Weights",
    "load_parameters",
    "load_tower",
    "random_table",
    "resolve_device",
]

Weights = Literal["checkpoint", "dummy"]

TOWERS = {  # architecture -> class
    "LlavaForConditionalGeneration": "vllm_vtprune.towers.llava:LlavaTower",
    "InternVLForConditionalGeneration": "vllm_vtprune.towers.internvl:InternVLTower",
    "LlavaNextForConditionalGeneration": "vllm_vtprune.towers.llava_next:LlavaNextTower",
    "Qwen2_5_VLForConditionalGeneration": "vllm_vtprune.towers.qwen2_5_vl:Qwen2_5_VLTower",
}

ROW_CACHE = 4096  # rows of the token table kept in memory: 32 MiB at d = 4096 in bfloat16


@dataclass(frozen=True)
class TokenTable:
    """The language model's input embedding table, (size, dim), read row by row."""

    rows: Callable[[Sequence[int]], Tensor]  # (M,) ids in range -> (M, dim)
    size: int
    dim: int


def random_table(size: int, dim: int, seed: int) -> TokenTable:
    """Rows of a random table that is never held: each drawn from N(0, 0.02^2), the same for the same seed and id."""

    def row(token_id: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + token_id) % 2**32)  # it uses 32 bits of a seed
        return torch.randn(dim, generator=generator) * 0.02

    return TokenTable(lambda ids: torch.stack([row(i) for i in ids]), size, dim)


@dataclass(frozen=True)
class PixelNorm:
    """How the values of an image's pixels, from 0 to 255, become what an encoder takes: in float32, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The function of patches (P, channels * values) that normalises them on `device`."""
        std = torch.tensor(self.std, dtype=torch.float32)
        scale = (self.rescale / std).to(device)[:, None]
        shift = (-torch.tensor(self.mean, dtype=torch.float32) / std).to(device)[:, None]
        return lambda pixels: (pixels.reshape(len(pixels), len(self.std), -1) * scale + shift).flatten(1)


def load_parameters(
    module: nn.Module,
    model_dir: Path,
    hf_config: Any,
    *,
    table: str,
    aliases: Aliases,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
) -> TokenTable:
    """Give `module`, built on the meta device, its parameters, and return the language model's token table.

    `table`: canonical name of that table, whose shape is that of `hf_config.text_config`. `aliases`: as
    `CheckpointReader` takes them. `seed`: None reads `model_dir`; a number makes both random instead.
    Raises TowerError where the files do not fit.
    """
    shape = (hf_config.text_config.vocab_size, hf_config.text_config.hidden_size)
    if seed is not None:
        fill_random(module, device=device, dtype=dtype, seed=seed)
        return random_table(*shape, seed)
    reader = CheckpointReader(model_dir, aliases)
    reader.plan({table: shape})
    load_into(module, reader, device=device, dtype=dtype)
    return TokenTable(partial(reader.rows, table), *shape)


class VisionTower(ABC):
    """A model's vision encoder and projector, in the API process. Safe to use from several threads."""

    device: torch.device
    dtype: torch.dtype
    weights: Weights  # "dummy": random, as with load_format="dummy"
    num_parameters: int  # encoder and projector, without the token table
    nbytes: int  # of those parameters

    def __init__(self, module: nn.Module, table: TokenTable, *, weights: Weights) -> None:
        """`module`: every parameter of the tower, on one device and in one dtype."""
        parameters = list(module.parameters())
        unset = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        if unset:
            raise TowerError(f"the vision tower has tensors that nothing has filled: {', '.join(unset[:4])}")
        self.device, self.dtype, self.weights = parameters[0].device, parameters[0].dtype, weights
        self.num_parameters = sum(p.numel() for p in parameters)
        self.nbytes = sum(p.nbytes for p in parameters)
        self._table = table
        self._rows: OrderedDict[int, Tensor] = OrderedDict()  # token id -> (d,) on the CPU, least recently used first
        self._rows_lock = threading.Lock()

    @abstractmethod
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """The visual tokens of B preprocessed images, as the model's own encoder and projector compute them.

        `images`: whose tensors have equal shapes, of any floating dtype and on any device. The features are on
        `self.device`; `embeds` and `encoder` are in `self.dtype`. Each image owns its memory, so dropping one frees it.

        An image encoded alone and in a batch may differ in the last bits: matrix products of other sizes add up in
        another order.

        Raises ValueError for pixels of a shape that the model does not take.
        """

    @abstractmethod
    def blank(self) -> PreparedImage:
        """A preprocessed image of the smallest size on which nothing is to be seen."""

    def sequence(self, features: VisualFeatures, plan: "PruningPlan") -> Tensor:
        """(T, d): what the language model reads of an image, on `plan.embeds`'s device.

        The embeddings of the tokens that `plan` keeps of `features`, in order, with whatever the model puts between
        them: nothing, in most families.
        """
        return plan.embeds

    def sequence_length(self, features: VisualFeatures) -> int:
        """How many embeddings the language model reads of the whole image, which is T with every token kept."""
        return features.num_tokens

    def token_rows(self, token_ids: Sequence[int]) -> Tensor:
        """(M, d): rows of the language model's input embedding table, in order, on `self.device` in `self.dtype`.

        Reads only rows that are not in a small LRU cache. Raises ValueError for an id outside the table.
        """
        wrong = [i for i in token_ids if not 0 <= i < self._table.size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is not in the embedding table: expected 0 to {self._table.size - 1}")
        if not token_ids:
            return torch.empty(0, self._table.dim, dtype=self.dtype, device=self.device)
        with self._rows_lock:
            missing = [i for i in dict.fromkeys(token_ids) if i not in self._rows]
            if missing:
                fetched = self._table.rows(missing).to(self.dtype)
                self._rows.update((i, row.clone()) for i, row in zip(missing, fetched, strict=True))
            for i in token_ids:
                self._rows.move_to_end(i)
            rows = torch.stack([self._rows[i] for i in token_ids])
            while len(self._rows) > ROW_CACHE:
                self._rows.popitem(last=False)
        return rows.to(self.device)


def resolve_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:INDEX`. Raises TowerError for a GPU that this process lacks."""
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise TowerError(f"device {name!r} is not there: this process sees {count} GPUs")
    return torch.device("cuda:0") if name == "cuda" else device


def load_tower(
    model_dir: Path,
    *,
    architecture: str,
    hf_config: "PretrainedConfig",
    dtype: torch.dtype,
    device: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
    pixel_norm: PixelNorm | None = None,
) -> VisionTower:
    """The vision tower of a model.

    `model_dir`: a local directory with the model's safetensors; not read where `load_format` is "dummy".
    `architecture`: as in the config's `architectures`.
    `hf_config`: the model's config. `dtype`: the model's.
    `device`: auto, cpu, cuda or cuda:INDEX.
    `load_format`: vLLM's. "dummy" fills the tower with random weights from `seed`; any other value reads safetensors.
    `pixel_norm`: for pixels that are to be normalised by the tower; None where the image processor does it.

    Raises TowerError where the architecture or its config is not supported, or the files do not fit.
    """
    if architecture not in TOWERS:
        raise TowerError(f"no vision tower for architecture {architecture!r}; supported: {', '.join(sorted(TOWERS))}")
    build: Callable[..., VisionTower] = pkgutil.resolve_name(TOWERS[architecture])
    return build(
        Path(model_dir),
        hf_config=hf_config,
        dtype=dtype,
        device=resolve_device(device),
        seed=seed if load_format == "dummy" else None,
        **({} if pixel_norm is None else {"pixel_norm": pixel_norm}),
    )

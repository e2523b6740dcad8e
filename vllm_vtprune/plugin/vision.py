"""vLLM's own vision encoder in an API process: the model class of the engine, built without its language model.

No engine is needed for it, and engine processes do not import this. vLLM builds models within process-wide state (a
current config, groups of a distributed world of one process), which is set here once where it is not there yet.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    VllmConfig,
    get_current_vllm_config,
    set_current_vllm_config,
)
from vllm.config.multimodal import AudioDummyOptions
from vllm.distributed import (
    ensure_model_parallel_initialized,
    get_tensor_model_parallel_world_size,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.multimodal.utils import group_and_batch_mm_items
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_vtprune import envs
from vllm_vtprune.features import Layout, PreparedImage, VisualFeatures
from vllm_vtprune.footprint import BATCH_PATCHES
from vllm_vtprune.placement import device_for
from vllm_vtprune.plugin.compat import loading
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.gpu import footprint_of, limit_memory, process_of
from vllm_vtprune.token_table import TokenTable
from vllm_vtprune.tower import TowerError, VisionTower, Weights

logger = init_logger("vllm.vtprune")


@dataclass(frozen=True)
class Facts:
    """What is known of an encoder before it is loaded.

    Attributes:
        weights: as of `VisionTower`.
        device: of this process, on which it encodes.
        dtype: of the features.
    """

    weights: Weights
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model_config: ModelConfig, engine: VllmConfig | None) -> Facts:
        """Those of a model's encoder; the arguments as for `load`.

        Raises:
            TowerError: the device is none of vLLM's platform or not known.
        """
        weights: Weights = "dummy" if envs.load_format() == "dummy" else "checkpoint"
        return cls(weights, torch.device(device_for(envs.device(), process_of(engine))), model_config.dtype)

    @property
    def labels(self) -> tuple[Weights, str, str]:
        """Weights, device and dtype, in words."""
        return self.weights, str(self.device), str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Built:
    """A model of vLLM's without its language model.

    Attributes:
        model: in evaluation mode.
        num_parameters, nbytes: of the checkpoint; vLLM may have laid weights out otherwise, as no parameters.
    """

    model: Any
    num_parameters: int
    nbytes: int


def build(model_config: ModelConfig, device: torch.device) -> Built:
    """A model of vLLM's with everything but its language model, on one device, with the weights of the checkpoint.

    Args:
        model_config: of the model; its vision part is built in the model's dtype.
        device: of vLLM's platform.

    Raises:
        TowerError: the weights are not there or do not fit, or this process is one of several that share a model.
    """
    if device.type == "cpu":
        loading.tell_memory_of_cpu()
    config = _encoder_only(model_config, device)
    with set_current_vllm_config(config), current(device):
        _join_world_of_one()
        with set_default_torch_dtype(model_config.dtype), device, loading.rotary_embeddings_of_its_own():
            model = initialize_model(vllm_config=config)
        _leave_out_heads(model)
        parameters = list(model.parameters())
        held = Built(model, sum(map(torch.numel, parameters)), sum(weights.nbytes for weights in parameters))
        if config.load_config.load_format == "dummy":
            for name, value in random_values(model, dtype=model_config.dtype, seed=model_config.seed):
                model.get_parameter(name).data.copy_(value)  # vLLM's own are next to 0, which makes all tokens one
        else:
            _read_weights(model, config)
        process_weights_after_loading(model, config.model_config, device)
    model.requires_grad_(False).eval()
    return held


def _leave_out_heads(model: nn.Module) -> None:
    """Some models of vLLM's keep the head of the language model that they leave out."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ParallelLMHead):
            model.set_submodule(name, StageMissingLayer("language_model", module))


def _read_weights(model: Any, config: VllmConfig) -> None:
    """Load a model's weights from its checkpoint, and see that all of them came.

    vLLM itself takes a matrix that is missing for loaded (model_executor/model_loader/default_loader.py of 0.32.0,
    ``track_weights_loading``), and of one that does not fit says no name.
    """
    tracked = config.model_config.quantization is None  # or else some are made while others are loaded
    name = "nothing"

    def noted(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal name
        for named in weights:
            name = named[0]
            yield named

    if tracked:
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    load_weights = model.load_weights
    model.load_weights = lambda weights: load_weights(noted(weights))
    try:
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise TowerError(
            f"{config.model_config.model}: its vision encoder cannot be loaded: {reason} (read last: {name})"
        ) from error
    finally:
        del model.load_weights
    missing = [name for name, weights in model.named_parameters() if tracked and weights.isnan().any()]
    if missing:
        raise TowerError(
            f"{config.model_config.model}: its vision encoder cannot be loaded: {len(missing)} tensors are missing, "
            f"incomplete or not numbers: {', '.join(missing[:5])}"
        )


def random_values(module: nn.Module, *, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Values for the parameters of a module, by name, on the CPU: the same for the same seed and dtype on any device.

    Matrices have variance 1 / fan-in, so activations keep their scale through the depth of an encoder and tokens stay
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


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within this context, kernels that name no GPU run on this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _encoder_only(model_config: ModelConfig, device: torch.device) -> VllmConfig:
    alone = copy(model_config)
    # no `replace`: it reads the limits anew, which are not accepted in the form that they are kept in
    alone.multimodal_config = copy(model_config.get_multimodal_config())
    alone.multimodal_config.mm_encoder_only = True
    silent = {"audio": AudioDummyOptions(count=0)}  # or models that also hear build what they hear with
    alone.multimodal_config.limit_per_prompt = {**alone.multimodal_config.limit_per_prompt, **silent}
    alone.enforce_eager = True
    directory = envs.download_dir()
    return VllmConfig(
        model_config=alone,
        load_config=LoadConfig(
            load_format=envs.load_format(), download_dir=None if directory is None else str(directory)
        ),
        cache_config=CacheConfig(enable_prefix_caching=False),
        device_config=DeviceConfig(device=device.type),
    )


def _join_world_of_one() -> None:
    if not model_parallel_is_initialized():
        any_model = copy(get_current_vllm_config())
        any_model.model_config = None  # of one without experts, none with could follow
        with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(any_model):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
    if get_tensor_model_parallel_world_size() > 1:
        raise TowerError("this process holds a part of the model alone, and so cannot hold a whole vision encoder")


def load(family: Family, model_config: ModelConfig, *, largest: int, engine: VllmConfig | None) -> Encoder:
    """The vision encoder of a model, on the device of this process, with the weights that the engine loads.

    Args:
        family: of the model.
        model_config: of the model.
        largest: tokens of the largest image that the processor makes.
        engine: the engine's config, which a server's processor has and one of `vllm.LLM` has not.

    Raises:
        TowerError: the weights are not there or do not fit, or the device is none of vLLM's platform or not known.
    """
    device = Facts.of(model_config, engine).device
    if device.type == "cuda":
        limit_memory(device, footprint_of(model_config, family, largest), engine)
    encoder = Encoder(family, model_config, device)
    logger.info(
        "Frontend vision tower loaded: %s weights, %s, %.0f MiB on %s",
        *(encoder.weights, encoder.dtype, encoder.nbytes / 2**20, device),
    )
    return encoder


class Encoder(VisionTower):
    """The vision encoder of a model of vLLM's, read by hooks on its way.

    ``encoder`` is what feeds the connector, of merged patches their mean, or ``embeds`` where no more is known of the
    family; ``embeds`` what the engine would compute; ``cls_attention`` and ``keys`` those of the last attention, the
    sum and the mean of merged patches; ``overview_attention`` that of the first layer.

    Args:
        family: of the model.
        model_config: of the model.
        device: as `build` takes it.

    Raises:
        TowerError: as of `build`, or the checkpoint holds no embeddings of words.
    """

    def __init__(self, family: Family, model_config: ModelConfig, device: torch.device) -> None:
        self.device, self.dtype = device, model_config.dtype
        dummy = envs.load_format() == "dummy"
        self.weights: Weights = "dummy" if dummy else "checkpoint"
        text = model_config.hf_text_config
        if dummy:
            self._table = TokenTable.random(text.vocab_size, text.hidden_size, model_config.seed)
        else:
            self._table = TokenTable.of_checkpoint(loading.model_directory(model_config), text.hidden_size)
        built = build(model_config, device)
        self._model, self.num_parameters, self.nbytes = built.model, built.num_parameters, built.nbytes
        self._lock = threading.Lock()  # of what the hooks have seen
        self._width: int = text.hidden_size
        self._across = family.merge(model_config.hf_config)
        self._patches = 1 if family.pooled else self._across**2  # of a token, in what the connector is given
        self._rows = family.rows
        self._connector = _Inputs(_submodule(built.model, family.connector)) if family.connector else None
        self._attention = [_Inputs(_submodule(built.model, path)) for path in family.attention or ()]

    def token_rows(self, token_ids: Sequence[int]) -> Tensor:
        return self._table.rows(token_ids).to(self.device, self.dtype)

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        with self._lock, current(self.device):
            return [features for batch in batches(images) for features in self._encode(batch)]

    def _encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        hooks = [hook for hook in (self._connector, *self._attention) if hook is not None]
        for hook in hooks:
            hook.calls.clear()
        embeds = [
            rows
            for _, fields in group_and_batch_mm_items([image.item for image in images], device=self.device)
            for rows in self._model.embed_multimodal(**fields)
        ]
        tokens = [image.layout.patches // self._across**2 for image in images]
        encoder, early, attention, keys = None, None, None, None
        if self._connector is not None:
            given = [self._rows(self._connector.module, *arguments) for arguments in self._connector.calls]
            states = torch.cat([rows.flatten(0, -2) for rows in given])
            encoder = torch.split(states.reshape(sum(tokens), self._patches, -1).mean(dim=1), tokens)
        if self._attention:
            first, last = (
                [_of_cls(inputs.module, *call[:2], across=self._across) for call in inputs.calls]
                for inputs in self._attention
            )
            early = torch.split(torch.cat([seen for seen, _ in first]), tokens)
            attention = torch.split(torch.cat([seen for seen, _ in last]), tokens)
            keys = torch.split(torch.cat([its for _, its in last]), tokens)
        for hook in hooks:
            hook.calls.clear()
        return [
            self._features(
                image.layout,
                embeds[i],
                *(None if values is None else values[i] for values in (encoder, early, attention, keys)),
            )
            for i, image in enumerate(images)
        ]

    def _features(
        self,
        layout: Layout,
        rows: Tensor,
        encoder: Tensor | None,
        early: Tensor | None,
        attention: Tensor | None,
        keys: Tensor | None,
    ) -> VisualFeatures:
        """Those of one image, from the rows that belong to it."""

        def own(values: Tensor) -> Tensor:
            values = values.clone() if layout.sources is None else values[layout.sources.to(self.device)]
            return values if layout.scaled is None else scaled(values, layout)

        newline = None
        if layout.places is not None:
            places = layout.places.to(self.device)
            is_token = torch.zeros(len(rows), dtype=torch.bool, device=self.device).index_fill(0, places, True)
            newline = None if is_token.all() else rows[~is_token][0].clone()
            rows = rows[places]
        embeds = rows[:, : self._width].clone()
        tiles, overview = layout.tiles, None
        if tiles is not None:
            tiles = replace(tiles, ids=tiles.ids.to(self.device))
            if early is not None and tiles.overview is not None:
                overview = own(early)[tiles.ids == tiles.overview]
        return VisualFeatures(
            encoder=embeds if encoder is None else own(encoder),
            embeds=embeds,
            grid=layout.grid,
            tiles=tiles,
            cls_attention=None if attention is None else own(attention),
            overview_attention=overview,
            keys=None if keys is None else own(keys),
            deepstack=rows[:, self._width :].clone() if rows.shape[1] > self._width else None,
            newline=newline,
            prompt=layout.prompt,
        )


class _Inputs:
    """The arguments of each call of a module, since `calls` was emptied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[Tensor, ...]] = []
        module.register_forward_pre_hook(lambda _, arguments: self.calls.append(arguments))


def scaled(values: Tensor, layout: Layout) -> Tensor:
    """(n, d) the overview and the canvas that is scaled -> (N, d) the overview and the canvas of the tokens."""
    assert layout.scaled is not None
    assert layout.tiles is not None
    overview, canvas = torch.split(values, [len(values) - prod(layout.scaled), prod(layout.scaled)])
    planes = canvas.T.reshape(1, -1, *layout.scaled)
    tokens = nn.functional.interpolate(planes, layout.tiles.canvas, mode="bilinear")[0]
    return torch.cat([overview, tokens.flatten(1).T])


def _submodule(model: nn.Module, path: str) -> nn.Module:
    module: Any = model
    for part in path.split("."):
        module = module[int(part)] if part.lstrip("-").isdigit() else getattr(module, part)
    found: nn.Module = module
    return found


def _of_cls(attention: Any, query: Tensor, key: Tensor, *, across: int) -> tuple[Tensor, Tensor]:
    """What the CLS token attends to, without the map of all pairs, and keys; one value, or row, for each token.

    Args:
        attention: vLLM's layer.
        query, key: ``(S, 1 + n, heads * d)`` of S squares of n patches.
        across: patches of a token in either direction, in raster order of the square.

    Returns:
        ``(T,)`` in float32, the sum over a token's patches of their softmax over all 1 + n, mean over heads; and
        ``(T, d)`` the mean of its patches' keys, mean over heads.
    """
    query, key = (states.view(*states.shape[:2], -1, attention.head_size) for states in (query, key))
    scores = torch.einsum("shd,snhd->shn", query[:, 0].float(), key.float()) * attention.scale
    seen = scores.softmax(dim=-1).mean(dim=1)[:, 1:, None]
    return _blocks(seen, across).sum(dim=1)[:, 0], _blocks(key[:, 1:].mean(dim=2), across).mean(dim=1)


def _blocks(patches: Tensor, across: int) -> Tensor:
    """(S, n, d) in raster order of a square -> (S * n / across^2, across^2, d): its blocks in raster order."""
    squares, count, width = patches.shape
    blocks = isqrt(count) // across
    grid = patches.view(squares, blocks, across, blocks, across, width)
    return grid.transpose(2, 3).reshape(squares * blocks**2, across**2, width)


def batches(images: Sequence[PreparedImage]) -> Iterator[Sequence[PreparedImage]]:
    """Consecutive images that together stay within `BATCH_PATCHES`, or one that is larger alone."""
    begin, total = 0, 0
    for end, image in enumerate(images):
        if end > begin and total + image.layout.patches > BATCH_PATCHES:
            yield images[begin:end]
            begin, total = end, 0
        total += image.layout.patches
    if begin < len(images):
        yield images[begin:]

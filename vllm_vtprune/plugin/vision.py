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
from dataclasses import dataclass
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
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.placement import device_for
from vllm_vtprune.plugin.compat import loading
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.gpu import footprint_of, limit_memory, process_of
from vllm_vtprune.plugin.reading import FeatureReader, batches
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
    """The vision encoder of a model of vLLM's, read by a `FeatureReader`.

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
        self._lock = threading.Lock()  # of what the reader has seen
        self._reader = FeatureReader(built.model, family, model_config)

    def token_rows(self, token_ids: Sequence[int]) -> Tensor:
        return self._table.rows(token_ids).to(self.device, self.dtype)

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        with self._lock, current(self.device):
            parts = batches([image.layout for image in images])
            return [features for part in parts for features in self._encode(images[part.start : part.stop])]

    def _encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        with self._reader.watching():
            embeds = [
                rows
                for _, fields in group_and_batch_mm_items([image.item for image in images], device=self.device)
                for rows in self._model.embed_multimodal(**fields)
            ]
            return self._reader.features(embeds, [image.layout for image in images])

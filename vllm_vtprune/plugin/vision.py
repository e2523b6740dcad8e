"""vLLM's own vision encoder in an API process: the engine's model class, built without its language model.

Needs no engine; engine processes do not import this module. vLLM builds models inside process-wide state (a current
config, distributed groups). It is set up here, once, unless it already exists.
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
from vllm_vtprune.devices import EncoderPlace
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plugin.compat import loading
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.gpu import footprint_of, limit_memory
from vllm_vtprune.plugin.reading import FeatureReader, batches
from vllm_vtprune.vision_encoder import EncoderError, VisionEncoder, Weights

logger = init_logger("vllm.vtprune")


@dataclass(frozen=True)
class BuiltModel:
    """A vLLM model without its language model.

    Attributes:
        model: the module, in evaluation mode.
        num_parameters, nbytes: size of its weights in the checkpoint. vLLM may repack weights into non-parameters.
    """

    model: Any
    num_parameters: int
    nbytes: int


def build(model_config: ModelConfig, device: torch.device) -> BuiltModel:
    """Build a vLLM model without its language model, on one device, and load its weights from the checkpoint.

    Args:
        model_config: vLLM's config; the encoder is built in its dtype.
        device: device on vLLM's platform.

    Raises:
        EncoderError: weights are missing or do not fit, or this process is one of several that share a model.
    """
    if device.type == "cpu":
        loading.report_cpu_memory()
    config = _encoder_only(model_config, device)
    with set_current_vllm_config(config), on_gpu(device):
        _init_single_process_group()
        with set_default_torch_dtype(model_config.dtype), device, loading.private_rotary_embeddings():
            model = initialize_model(vllm_config=config)
        _remove_heads(model)
        parameters = list(model.parameters())
        built = BuiltModel(model, sum(map(torch.numel, parameters)), sum(weights.nbytes for weights in parameters))
        if config.load_config.load_format == "dummy":
            for name, value in random_values(model, dtype=model_config.dtype, seed=model_config.seed):
                model.get_parameter(name).data.copy_(value)  # vLLM's dummy weights are near 0, so tokens would be equal
        else:
            _read_weights(model, config)
        process_weights_after_loading(model, config.model_config, device)
    model.requires_grad_(False).eval()
    return built


def _remove_heads(model: nn.Module) -> None:
    """Remove language model heads, which some vLLM models build even without the language model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ParallelLMHead):
            model.set_submodule(name, StageMissingLayer("language_model", module))


def _read_weights(model: Any, config: VllmConfig) -> None:
    """Load a model's weights from its checkpoint and check that all of them were loaded.

    vLLM 0.32.0 does not notice a missing weight (model_executor/model_loader/default_loader.py,
    ``track_weights_loading``), and does not name a weight of the wrong shape.
    """
    check_missing = config.model_config.quantization is None  # quantization creates parameters during loading
    last_name = "nothing"

    def record_name(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        nonlocal last_name
        for name, weight in weights:
            last_name = name
            yield name, weight

    if check_missing:
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    load_weights = model.load_weights
    model.load_weights = lambda weights: load_weights(record_name(weights))
    try:
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise EncoderError(
            f"{config.model_config.model}: cannot load the vision encoder: {reason} (last weight read: {last_name})"
        ) from error
    finally:
        del model.load_weights
    missing = [name for name, weights in model.named_parameters() if check_missing and weights.isnan().any()]
    if missing:
        raise EncoderError(
            f"{config.model_config.model}: cannot load the vision encoder: {len(missing)} tensors are missing, "
            f"incomplete or NaN: {', '.join(missing[:5])}"
        )


def random_values(module: nn.Module, *, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random values for a module's parameters, by name, on the CPU. Determined by seed and dtype, not by device.

    Matrices have variance 1 / fan-in, so activations keep their scale through the encoder and tokens stay distinct.
    Norms are the identity, biases 0. Uniform, because it is faster than normal: 300M values in about a second.
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
            bound = (3 / fan_in) ** 0.5  # uniform on [-b, b] has variance b^2 / 3
            value.uniform_(-bound, bound, generator=generator)
        yield name, value


def on_gpu(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU torch's current device within this context; does nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _encoder_only(model_config: ModelConfig, device: torch.device) -> VllmConfig:
    encoder_config = copy(model_config)
    # copied, because `dataclasses.replace` validates `limit_per_prompt` again and rejects its parsed form
    multimodal = encoder_config.multimodal_config = copy(model_config.get_multimodal_config())
    multimodal.mm_encoder_only = True
    no_audio = {"audio": AudioDummyOptions(count=0)}  # otherwise audio models also build their audio encoder
    multimodal.limit_per_prompt = {**multimodal.limit_per_prompt, **no_audio}
    encoder_config.enforce_eager = True
    directory = envs.download_dir()
    return VllmConfig(
        model_config=encoder_config,
        load_config=LoadConfig(
            load_format=envs.load_format(), download_dir=None if directory is None else str(directory)
        ),
        cache_config=CacheConfig(enable_prefix_caching=False),
        device_config=DeviceConfig(device=device.type),
    )


def _init_single_process_group() -> None:
    if not model_parallel_is_initialized():
        config = copy(get_current_vllm_config())
        config.model_config = None  # groups made for a dense model would not serve a later model with experts
        with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
    if get_tensor_model_parallel_world_size() > 1:
        raise EncoderError("this process holds only a tensor-parallel part of the model; expected an API process")


def load(family: Family, model_config: ModelConfig, *, largest: int, place: EncoderPlace) -> Encoder:
    """Load a model's vision encoder in this process, with the weights that the engine loads.

    Args:
        family: the model's family.
        model_config: vLLM's config of the model.
        largest: visual tokens of the largest image that the image processor makes.
        place: where this process encodes.

    Raises:
        EncoderError: weights are missing or do not fit.
    """
    device = torch.device(place.device)
    if device.type == "cuda":
        reserved = model_config.get_multimodal_config().mm_ipc_gpu_memory_gb
        limit_memory(place, footprint_of(model_config, family, largest), reserved)
    encoder = Encoder(family, model_config, device)
    logger.info(
        "Vision encoder loaded: %s weights, %s, %.0f MiB on %s",
        *(encoder.weights, encoder.dtype, encoder.nbytes / 2**20, device),
    )
    return encoder


class Encoder(VisionEncoder):
    """A vLLM model's vision encoder, read by a `FeatureReader`.

    Raises:
        EncoderError: see `build`; or the checkpoint holds no input embeddings of the language model.
    """

    def __init__(self, family: Family, model_config: ModelConfig, device: torch.device) -> None:
        self.device, self.dtype = device, model_config.dtype
        self.weights: Weights = "dummy" if envs.load_format() == "dummy" else "checkpoint"
        self._table = loading.token_table(model_config)
        built = build(model_config, device)
        self._model, self.num_parameters, self.nbytes = built.model, built.num_parameters, built.nbytes
        self._lock = threading.Lock()  # guards what the reader records
        self._reader = FeatureReader(built.model, family, model_config)

    def token_rows(self, token_ids: Sequence[int]) -> Tensor:
        return self._table.rows(token_ids).to(self.device, self.dtype)

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        with self._lock, on_gpu(self.device):
            parts = batches([image.layout for image in images])
            return [features for part in parts for features in self._encode(images[part.start : part.stop])]

    def _encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        with self._reader.recording():
            embeds = [
                rows
                for _, fields in group_and_batch_mm_items([image.item for image in images], device=self.device)
                for rows in self._model.embed_multimodal(**fields)
            ]
            return self._reader.features(embeds, [image.layout for image in images])

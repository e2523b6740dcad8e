"""vLLM's own vision encoder in an API process: the model class of the engine, built without its language model.

No engine is needed for it, and engine processes do not import this. vLLM builds models within process-wide state (a
current config, groups of a distributed world of one process), which is set here once where it is not there yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    ensure_model_parallel_initialized,
    get_tensor_model_parallel_world_size,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_vtprune import envs
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin import compat
from vllm_vtprune.towers.base import TokenTable, VisionTower, random_table
from vllm_vtprune.towers.qwen2_5_vl import batches
from vllm_vtprune.towers.weights import CheckpointReader, TowerError, random_values

__all__ = ["Encoder", "Qwen3VLEncoder", "build_encoder"]

TOKEN_TABLE = "language_model.embed_tokens.weight"
ALIASES = {
    "language_model.embed_tokens.": ("model.language_model.embed_tokens.", "language_model.model.embed_tokens."),
}


@dataclass(frozen=True)
class Encoder:
    """A model of vLLM's without its language model.

    Attributes:
        model: in evaluation mode.
        num_parameters, nbytes: of the checkpoint; vLLM may have laid weights out otherwise, as no parameters.
    """

    model: Any
    num_parameters: int
    nbytes: int


def build_encoder(model_class: type[nn.Module], model_config: ModelConfig, device: torch.device) -> Encoder:
    """A model of vLLM's with everything but its language model, on one device, with the weights of the checkpoint.

    Args:
        model_class: vLLM's own.
        model_config: of the model; its vision part is built in the model's dtype.
        device: of vLLM's platform.

    Raises:
        TowerError: the device is not one of vLLM's platform, or this process is one of several that share a model.
    """
    if current_platform.device_type != device.type:
        raise TowerError(
            f"this model's images are encoded by vLLM's code for {current_platform.device_type}, not on {device}: set "
            "VTPRUNE_DEVICE to auto"
        )
    config = _encoder_only(model_config, device)
    with set_current_vllm_config(config), current(device):
        _join_world_of_one()
        with set_default_torch_dtype(model_config.dtype), device:
            model = initialize_model(vllm_config=config, model_class=model_class)
        parameters = list(model.parameters())
        held = Encoder(model, sum(map(torch.numel, parameters)), sum(weights.nbytes for weights in parameters))
        if config.load_config.load_format == "dummy":
            for name, value in random_values(model, dtype=model_config.dtype, seed=model_config.seed):
                model.get_parameter(name).data.copy_(value)  # vLLM's own are next to 0, which makes all tokens one
        else:
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, device)
    model.requires_grad_(False).eval()
    return held


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within this context, kernels that name no GPU run on this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _encoder_only(model_config: ModelConfig, device: torch.device) -> VllmConfig:
    alone = copy(model_config)
    # no `replace`: it reads the limits anew, which are not accepted in the form that they are kept in
    alone.multimodal_config = copy(model_config.get_multimodal_config())
    alone.multimodal_config.mm_encoder_only = True
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
        with tempfile.TemporaryDirectory() as folder:
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
    if get_tensor_model_parallel_world_size() > 1:
        raise TowerError("this process holds a part of the model alone, and so cannot hold a whole vision encoder")


class Qwen3VLEncoder(VisionTower):
    """The vision encoder of Qwen3VLForConditionalGeneration.

    ``encoder`` is what the merger reads, the mean of a token's patches; ``embeds`` is what it gives, and ``deepstack``
    what the mergers of earlier layers give, side by side.
    """

    @classmethod
    def of(cls, model_config: ModelConfig, device: torch.device) -> Qwen3VLEncoder:
        """That of a model; see `build_encoder`."""
        return cls(build_encoder(Qwen3VLForConditionalGeneration, model_config, device), model_config)

    def __init__(self, built: Encoder, model_config: ModelConfig) -> None:
        hf_config = model_config.hf_config
        shape = (hf_config.text_config.vocab_size, hf_config.text_config.hidden_size)
        if envs.load_format() == "dummy":
            table = random_table(*shape, model_config.seed)
        else:
            reader = CheckpointReader(compat.model_directory(model_config), ALIASES)
            reader.plan({TOKEN_TABLE: shape})
            table = TokenTable(partial(reader.rows, TOKEN_TABLE), *shape)
        super().__init__(built.model, table, weights="dummy" if envs.load_format() == "dummy" else "checkpoint")
        self.num_parameters, self.nbytes = built.num_parameters, built.nbytes
        self._model, self._vision = built.model, hf_config.vision_config
        self._width: int = shape[1]
        self._pixel_dtype = torch.float32 if compat.pixel_norm(model_config) is None else torch.uint8
        self._patches: Tensor | None = None  # (P, C) what the merger was given last
        # Not of the merger itself: vLLM calls what it could compile past its hooks.
        built.model.visual.merger.norm.register_forward_pre_hook(self._note_patches)

    def _note_patches(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        self._patches = arguments[0]

    def blank(self) -> PreparedImage:
        side = 4 * self._vision.spatial_merge_size
        values = self._vision.in_channels * self._vision.temporal_patch_size * self._vision.patch_size**2
        pixels = torch.zeros(side * side, values, dtype=self._pixel_dtype)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([1, side, side])}

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """As `VisionTower.encode`, for images with `image_grid_thw` (3,) = (1, h, w) and `pixel_values` (h * w, D)."""
        sizes = [int(image["image_grid_thw"].prod()) for image in images]
        return [features for batch in batches(sizes) for features in self._encode([images[i] for i in batch])]

    def _encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        pixels = torch.cat([image["pixel_values"] for image in images]).to(self.device)
        grids = torch.stack([image["image_grid_thw"] for image in images])
        with current(self.device):
            embeds = self._model.embed_multimodal(pixel_values=pixels, image_grid_thw=grids)
        assert self._patches is not None
        merge = self._vision.spatial_merge_size
        patches, self._patches = self._patches, None
        means = patches.reshape(-1, merge * merge, patches.shape[-1]).mean(dim=1)
        found = []
        encoder = torch.split(means, [len(rows) for rows in embeds])
        for rows, own, (_, height, width) in zip(embeds, encoder, grids.tolist(), strict=True):
            found.append(
                VisualFeatures(
                    encoder=own.clone(),
                    embeds=rows[:, : self._width].clone(),
                    deepstack=rows[:, self._width :].clone() if rows.shape[1] > self._width else None,
                    grid=(height // merge, width // merge),
                )
            )
        return found

    def sequence(self, features: VisualFeatures, plan: PruningPlan) -> Tensor:
        """(T, d + p): the kept tokens, each with its deepstack; a merged one has that of the token in its place."""
        if features.deepstack is None:
            return plan.embeds
        deepstack = features.deepstack[plan.kept.to(features.deepstack.device)]
        return torch.cat([plan.embeds, deepstack.to(plan.embeds)], dim=1)

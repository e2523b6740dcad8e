"""Read from vLLM which GPUs an API process and its engines use, as input of `vllm_vtprune.devices`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm import envs as vllm_envs
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_vtprune import envs
from vllm_vtprune.devices import (
    GIB,
    GPU_PLATFORMS,
    EncoderPlace,
    Footprint,
    Process,
    allocator_fraction,
    device_for,
    encoder_places,
    reserve,
)
from vllm_vtprune.footprint import Shape, footprint
from vllm_vtprune.local_encoder import ENCODE_BATCH, ON_DEVICE_BYTES
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.vision_encoder import EncoderError, Weights

logger = init_logger("vllm.vtprune")


def process_of(engine: VllmConfig | None) -> Process:
    """Describe this API process, its GPUs and its engines.

    vLLM 0.32.0 gives local rank r of local engine e the GPU ``e * world size + r`` of the assigned or visible ones
    (v1/worker/gpu_worker.py, ``init_device``). Processors of `vllm.LLM` get no engine config. Remove when vLLM assigns
    a device to API processes.
    """
    if engine is None:
        return local_process(first_engine=max(vllm_envs.VLLM_DP_RANK_LOCAL, 0), gpus=None)
    parallel = engine.parallel_config
    return local_process(
        assigned=parallel.assigned_physical_gpu_ids,
        rank=compat.api_process(parallel)[0],
        engines=parallel.data_parallel_size_local,
        first_engine=parallel.data_parallel_rank_local or 0,
        gpus=parallel.local_world_size,
        ray=parallel.use_ray or parallel.data_parallel_backend == "ray",
    )


def local_process(*, assigned: Sequence[int] | None = None, **facts: Any) -> Process:
    """A `Process` of this machine with its visible GPUs.

    Args:
        assigned: physical ids of the engines' GPUs.
        facts: other attributes of `Process`.
    """
    platform = compat.platform_name(current_platform)
    visible = range(torch.cuda.device_count() if platform in GPU_PLATFORMS else 0)
    if assigned is None:
        return Process(platform, tuple(visible), **facts)
    physical = tuple(current_platform.visible_device_id_to_physical_device_id(index) for index in visible)
    return Process(platform, physical, assigned=tuple(assigned), **facts)


def encoder_labels(model_config: ModelConfig, engine: VllmConfig | None) -> tuple[Weights, str, str]:
    """Weights, device and dtype of this API process's encoder, without loading it.

    Args:
        model_config: vLLM's config of the model.
        engine: the engine's config; None in `vllm.LLM`, whose processor does not get it.

    Raises:
        EncoderError: the device is not on vLLM's platform or unknown.
    """
    weights: Weights = "dummy" if envs.load_format() == "dummy" else "checkpoint"
    device = torch.device(device_for(envs.device(), process_of(engine)))
    return weights, str(device), str(model_config.dtype).removeprefix("torch.")


def footprint_of(model_config: ModelConfig, family: Family, largest: int) -> Footprint:
    """GPU memory that a model's vision encoder needs in one process.

    Args:
        model_config: vLLM's config of the model.
        family: the model's family.
        largest: visual tokens of the largest image that the image processor makes.
    """
    config = model_config.hf_config
    shape = Shape.of(
        config.vision_config,
        parameters=family.parameters(config),
        width=model_config.hf_text_config.hidden_size,
        merge=family.merge(config),
        deepstack=family.deepstack(config),
        patches=family.patches(config),
        intermediate=family.intermediate(config),
    )
    return footprint(shape, model_config.dtype, tokens=largest, batch=ENCODE_BATCH, held=ON_DEVICE_BYTES)


def place_of(engine: VllmConfig | None) -> EncoderPlace:
    """Where this API process encodes, if it has an encoder of its own.

    Args:
        engine: the engine's config; None in `vllm.LLM`.

    Raises:
        EncoderError: see `device_for`.
    """
    process = process_of(engine)
    count = 1 if engine is None else compat.api_process(engine.parallel_config)[1]
    device = device_for(envs.device(), process)
    processes = [replace(process, rank=rank) for rank in range(count)]
    places = encoder_places(envs.device(), processes, shared=False)
    return next((place for place in places if place.device == device), EncoderPlace(device))


def limit_memory(place: EncoderPlace, need: Footprint, reserved: float) -> None:
    """Limit torch's GPU memory in this process to its share of the reserved memory, or to what the encoder needs.

    Args:
        place: where this process encodes.
        need: memory of the encoder, for one API process.
        reserved: GiB reserved on the GPU (``--mm-ipc-gpu-memory-gb``).
    """
    if not place.with_engine:
        return
    need, device = need.for_clients(place.clients), torch.device(place.device)
    card = torch.cuda.get_device_properties(device).total_memory
    try:
        warning = reserve(need, processes=place.processes, card=card, operator_gib=reserved).warning
    except EncoderError as error:
        warning = str(error)
    if warning:
        logger.warning(warning)
    share = reserved * GIB / place.processes if reserved else need.total
    torch.cuda.set_per_process_memory_fraction(allocator_fraction(share, card), device)

"""What vLLM says of an API process, its engines and their GPUs, for `vllm_vtprune.placement` to decide from."""

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
from vllm_vtprune.footprint import Shape, footprint
from vllm_vtprune.placement import (
    GIB,
    GPU_PLATFORMS,
    Footprint,
    Process,
    allocator_fraction,
    most_on_one_gpu,
    reserve,
)
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.runtime import ENCODE_BATCH, ON_DEVICE_BYTES
from vllm_vtprune.tower import TowerError

logger = init_logger("vllm.vtprune")


def process_of(engine: VllmConfig | None) -> Process:
    """What this API process knows of its GPUs and engines.

    vLLM 0.32.0 gives the worker of local rank r of the engine of local rank e the GPU ``e * world size + r`` of those
    that it was given or sees (v1/worker/gpu_worker.py, ``init_device``), and tells the processors of `vllm.LLM`
    nothing of it. Can go when an API process is given a device.
    """
    if engine is None:
        return seen_by_process(first_engine=max(vllm_envs.VLLM_DP_RANK_LOCAL, 0), gpus=None)
    parallel = engine.parallel_config
    return seen_by_process(
        assigned=parallel.assigned_physical_gpu_ids,
        rank=compat.api_process(parallel)[0],
        engines=parallel.data_parallel_size_local,
        first_engine=parallel.data_parallel_rank_local or 0,
        gpus=parallel.local_world_size,
        ray=parallel.use_ray or parallel.data_parallel_backend == "ray",
    )


def seen_by_process(*, assigned: Sequence[int] | None = None, **facts: Any) -> Process:
    """A process of this machine, with the GPUs that it sees.

    Args:
        assigned: physical ids of the GPUs that engines are given.
        facts: other attributes of the process.
    """
    platform = compat.platform_name(current_platform)
    visible = range(torch.cuda.device_count() if platform in GPU_PLATFORMS else 0)
    if assigned is None:
        return Process(platform, tuple(visible), **facts)
    physical = tuple(current_platform.visible_device_id_to_physical_device_id(index) for index in visible)
    return Process(platform, physical, assigned=tuple(assigned), **facts)


def footprint_of(model_config: ModelConfig, family: Family, largest: int) -> Footprint:
    """The GPU memory that a model's frontend tower takes in one process.

    Args:
        model_config: the model's config.
        family: of the model.
        largest: tokens of the largest image that the processor makes.
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


def limit_memory(device: torch.device, need: Footprint, engine: VllmConfig | None) -> None:
    """Have torch in this process take no more of a GPU than the engine there leaves free, or than the tower needs."""
    process = process_of(engine)
    count = 1 if engine is None else compat.api_process(engine.parallel_config)[1]
    sharing = most_on_one_gpu(envs.device(), [replace(process, rank=rank) for rank in range(count)])
    if not sharing:
        return
    multimodal = None if engine is None else engine.model_config.multimodal_config
    reserved = 0.0 if multimodal is None else multimodal.mm_ipc_gpu_memory_gb
    card = torch.cuda.get_device_properties(device).total_memory
    try:
        warning = reserve(need, processes=sharing, card=card, given=reserved).warning
    except TowerError as error:
        warning = str(error)
    if warning:
        logger.warning(warning)
    share = reserved * GIB / sharing if reserved else need.total
    torch.cuda.set_per_process_memory_fraction(allocator_fraction(share, card), device)

"""How much memory a server asks for, settled before its engine starts."""

from __future__ import annotations

import argparse
import os
import sys
from math import floor

from vllm import AsyncEngineArgs
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info, get_visible_memory_node

from vllm_vtprune import envs
from vllm_vtprune.placement import GIB, Process, most_on_one_gpu, reserve
from vllm_vtprune.plugin.compat.server import assigned_gpus
from vllm_vtprune.plugin.gpu import footprint_of, local_process
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.tower import TowerError
from vllm_vtprune_checkpoints import embedded_checkpoint

CPU_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
EMBEDDED_KV_CACHE = GIB
"""Bytes of the embedded model's KV cache on a CPU, where the operator asks for nothing else."""
GROWTH = 0.1
"""Share of a machine's memory that a server's processes may take before vLLM looks what is free."""


class Default(float):
    """vLLM's default of an option, told from the same number on the command line."""


def mark_defaults(parser: argparse.ArgumentParser) -> None:
    """Have a parser of vLLM's options say which of those that follow it were given."""
    for name in ("gpu_memory_utilization", "mm_ipc_gpu_memory_gb"):
        parser.set_defaults(**{name: Default(parser.get_default(name))})


def unmark_defaults(args: argparse.Namespace) -> None:
    """Make plain numbers of marked ones, for the processes that read the options after this one."""
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, float(value))


# --- On CPUs ------------------------------------------------------------------------------------------------------


def keep_embedded_small(args: argparse.Namespace) -> None:
    """Give the embedded model a small KV cache on a CPU, unless the operator says how much memory is to be used.

    vLLM would ask for 92 % of the machine's memory, which is there on no machine in use.
    """
    silent = isinstance(args.gpu_memory_utilization, Default) and not os.environ.get(CPU_VARIABLE)
    if current_platform.is_cpu() and args.model == str(embedded_checkpoint()) and silent:
        args.kv_cache_memory_bytes = args.kv_cache_memory_bytes or EMBEDDED_KV_CACHE


def cpu_memory_problem(args: argparse.Namespace, *, margin: float = 0.0) -> str:
    """Why vLLM's engine will not start on a CPU, for lack of memory; empty where it will, and where none starts.

    vLLM 0.32.0 looks at the memory of one node (v1/worker/cpu_worker.py). It says so far above its last lines.

    Args:
        args: the server's options.
        margin: share of the memory that may have been free when vLLM looked, and is not now, or the reverse.
    """
    if not current_platform.is_cpu() or args.data_parallel_size_local == 0:
        return ""
    node, nodes = get_allowed_cpu_list()[0].numa_node, get_visible_memory_node()
    memory = get_memory_node_info(node if node in nodes else nodes[0])
    variable = os.environ.get(CPU_VARIABLE)
    return lack_of_memory(
        total=memory.total_memory,
        free=memory.available_memory - margin * memory.total_memory,
        fraction=args.gpu_memory_utilization,
        kv_cache=int(variable) * GIB if variable else args.kv_cache_memory_bytes,
    )


def lack_of_memory(*, total: float, free: float, fraction: float, kv_cache: int | None) -> str:
    """What to set where vLLM would ask for more memory than is free; empty where it would not.

    Args:
        total: bytes of the machine.
        free: bytes of them.
        fraction: of the machine's memory, that vLLM takes without `kv_cache`.
        kv_cache: bytes; None where they follow from the fraction.
    """
    wanted = fraction * total if kv_cache is None else kv_cache
    if wanted <= free:
        return ""
    asked = f"{fraction:.0%} of this machine's memory" if kv_cache is None else "a KV cache"
    share = max(floor(80 * free / total), 1) / 100
    return (
        f"vLLM asks for {asked}, which is {wanted / GIB:.1f} GiB, and {max(free, 0) / GIB:.1f} of {total / GIB:.1f} "
        f"GiB are free; set {CPU_VARIABLE} to fewer GiB for the KV cache, or --gpu-memory-utilization to {share:g}"
    )


# --- On GPUs ------------------------------------------------------------------------------------------------------


def reserve_gpu_memory(args: argparse.Namespace, model_config: ModelConfig) -> None:
    """Have the engines leave the vision encoders of the API processes their room on the GPUs that they share.

    Sets ``--mm-ipc-gpu-memory-gb``, which vLLM 0.32.0 takes off the KV cache on every GPU (multimodal/
    gpu_ipc_memory.py), unless it was given. Nothing is reserved where images are encoded on a GPU without an engine
    or by the engine alone, nor for models that cannot be pruned and instances that do not prune.

    Raises:
        SystemExit: what was given does not hold the encoders, or their device is not there or not known.
    """
    if current_platform.is_cpu() or encodes_only(args) or envs.placement() == "engine":
        return
    processor = MULTIMODAL_REGISTRY.create_processor(model_config) if model_config.is_multimodal_model else None
    if not isinstance(processor, PruningProcessor):
        return
    option = None if isinstance(args.mm_ipc_gpu_memory_gb, Default) else args.mm_ipc_gpu_memory_gb
    try:
        sharing = most_on_one_gpu(envs.device(), api_processes(args))
        if not sharing:
            return
        need = footprint_of(model_config, processor.family, processor.max_image_tokens())
        reservation = reserve(
            need, processes=sharing, card=current_platform.get_device_total_memory(), operator_gib=option
        )
    except TowerError as error:
        sys.exit(f"vtprune serve: {error}")
    args.mm_ipc_gpu_memory_gb = reservation.gib
    message = f"vtprune serve: --mm-ipc-gpu-memory-gb is {reservation.gib:g}, for image encoding on each GPU. "
    print((message + reservation.warning).strip(), file=sys.stderr)


def encodes_only(args: argparse.Namespace) -> bool:
    """Whether an instance runs the vision encoder for others, and no language model whose prompts could be pruned."""
    return args.mm_encoder_only or (args.ec_transfer_config is not None and args.ec_transfer_config.is_encode_only)


def api_processes(args: argparse.Namespace) -> list[Process]:
    """The API processes that vLLM 0.32.0 starts on this machine (entrypoints/cli/serve.py); none if it is headless.

    With a supervisor for data parallelism, those of its servers, as if they were of one.
    """
    count, engines = _counts(args)
    ray = "ray" in (args.distributed_executor_backend, args.data_parallel_backend)
    return [
        local_process(
            assigned=assigned_gpus(AsyncEngineArgs.from_cli_args(args)),
            rank=rank,
            engines=engines,
            gpus=args.tensor_parallel_size * args.pipeline_parallel_size * args.prefill_context_parallel_size,
            ray=ray,
        )
        for rank in range(count)
    ]


def _counts(args: argparse.Namespace) -> tuple[int, int]:
    """How many API processes and engines run on this machine."""
    if args.headless:
        return 0, args.data_parallel_size_local or 1
    asked, local = args.api_server_count, args.data_parallel_size_local
    if args.data_parallel_multi_port_external_lb:
        return local or 1, local or 1
    if args.data_parallel_external_lb or args.data_parallel_rank is not None:
        return asked or 1, 1
    if args.data_parallel_hybrid_lb or args.data_parallel_start_rank is not None:
        return asked or local or 1, local or 1
    engines = max(args.data_parallel_size // args.nnodes, 1) if local is None else local
    return 1 if args.enable_elastic_ep else asked or args.data_parallel_size, engines

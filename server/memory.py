"""Set the memory that a server requests before its engine starts."""

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
from vllm_vtprune.devices import GIB, EncoderPlace, Process, encoder_places, reserve
from vllm_vtprune.plugin.compat.server import assigned_gpus
from vllm_vtprune.plugin.gpu import footprint_of, local_process
from vllm_vtprune.plugin.placement import role_of
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.vision_encoder import EncoderError
from vllm_vtprune_checkpoints import embedded_checkpoint

CPU_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
EMBEDDED_KV_CACHE = GIB
"""Default bytes of the embedded model's KV cache on a CPU."""
GROWTH = 0.1
"""Share of a machine's memory that a server's processes may use before vLLM checks the free memory."""


class Default(float):
    """vLLM's default of an option, distinguishable from the same number on the command line."""


def mark_defaults(parser: argparse.ArgumentParser) -> None:
    """Mark a parser's defaults of memory options, to see later whether the operator set them."""
    for name in ("gpu_memory_utilization", "mm_ipc_gpu_memory_gb"):
        parser.set_defaults(**{name: Default(parser.get_default(name))})


def unmark_defaults(args: argparse.Namespace) -> None:
    """Convert marked defaults into plain numbers, for other processes."""
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, float(value))


# --- On CPUs ------------------------------------------------------------------------------------------------------


def limit_embedded_kv_cache(args: argparse.Namespace) -> None:
    """Give the embedded model a small KV cache on a CPU, unless the operator sets its size.

    vLLM's default is 92 % of the machine's memory, which is never free.
    """
    is_default = isinstance(args.gpu_memory_utilization, Default) and not os.environ.get(CPU_VARIABLE)
    if current_platform.is_cpu() and args.model == str(embedded_checkpoint()) and is_default:
        args.kv_cache_memory_bytes = args.kv_cache_memory_bytes or EMBEDDED_KV_CACHE


def cpu_memory_problem(args: argparse.Namespace, *, margin: float = 0.0) -> str:
    """Why the engine will not start on a CPU for lack of memory; empty if it will, or if there is none.

    vLLM 0.32.0 checks the memory of one NUMA node (v1/worker/cpu_worker.py), and its error is far above its last log
    lines.

    Args:
        args: the server's options.
        margin: share of the memory by which the free memory may have changed since vLLM's check.
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
    """The problem and its solution if vLLM would request more memory than is free; else empty.

    Args:
        total: the machine's memory, in bytes.
        free: free memory, in bytes.
        fraction: fraction of the memory that vLLM requests without `kv_cache`.
        kv_cache: bytes of the KV cache; None: from the fraction.
    """
    requested = fraction * total if kv_cache is None else kv_cache
    if requested <= free:
        return ""
    what = f"{fraction:.0%} of this machine's memory" if kv_cache is None else "a KV cache"
    share = max(floor(80 * free / total), 1) / 100
    return (
        f"vLLM asks for {what}, which is {requested / GIB:.1f} GiB, and {max(free, 0) / GIB:.1f} of {total / GIB:.1f} "
        f"GiB are free; set {CPU_VARIABLE} to fewer GiB for the KV cache, or --gpu-memory-utilization to {share:g}"
    )


# --- On GPUs ------------------------------------------------------------------------------------------------------


def reserve_gpu_memory(args: argparse.Namespace, model_config: ModelConfig) -> None:
    """Reserve GPU memory for vision encoders on the engines' GPUs.

    Sets ``--mm-ipc-gpu-memory-gb``, which vLLM 0.32.0 subtracts from the KV cache on every GPU (multimodal/
    gpu_ipc_memory.py), unless the operator set it. Reserves nothing if images are encoded on a GPU without an engine
    or by the engine alone, or if the model or the instance does not prune.

    Raises:
        SystemExit: the operator's value is too small, or the encoders' device is missing or unknown.
    """
    if current_platform.is_cpu() or not prunes_outside_engine(args):
        return
    processor = pruning_processor(model_config)
    if processor is None:
        return
    option = None if isinstance(args.mm_ipc_gpu_memory_gb, Default) else args.mm_ipc_gpu_memory_gb
    try:
        places = [place for place in places_of(args) if place.with_engine]
        if not places:
            return
        busiest = max(places, key=lambda place: place.processes * place.clients)
        need = footprint_of(model_config, processor.family, processor.max_image_tokens()).for_clients(busiest.clients)
        card = current_platform.get_device_total_memory()
        reservation = reserve(need, processes=busiest.processes, card=card, operator_gib=option)
    except EncoderError as error:
        sys.exit(f"vtprune serve: {error}")
    args.mm_ipc_gpu_memory_gb = reservation.gib
    message = f"vtprune serve: --mm-ipc-gpu-memory-gb is {reservation.gib:g}, for image encoding on each GPU. "
    print((message + reservation.warning).strip(), file=sys.stderr)


def prunes_outside_engine(args: argparse.Namespace) -> bool:
    """Whether policies may select tokens outside the engine, if the model can be pruned."""
    transfer = args.ec_transfer_config
    encodes_alone = args.mm_encoder_only and transfer is None
    follows_plans = role_of(transfer) == "consumer" and envs.placement() == "auto"
    return not encodes_alone and not follows_plans and envs.placement() != "engine"


def pruning_processor(model_config: ModelConfig) -> PruningProcessor | None:
    """The multimodal processor of a model; None if it cannot prune."""
    processor = MULTIMODAL_REGISTRY.create_processor(model_config) if model_config.is_multimodal_model else None
    return processor if isinstance(processor, PruningProcessor) else None


def places_of(args: argparse.Namespace) -> list[EncoderPlace]:
    """Where this server encodes images.

    Raises:
        EncoderError: the device is missing or unknown.
    """
    return encoder_places(envs.device(), api_processes(args), shared=shares_encoders(args))


def shares_encoders(args: argparse.Namespace) -> bool:
    """Whether one encoder process per device serves all API processes.

    The servers of a data-parallel supervisor have one API process each, and keep their own encoder.
    """
    return _counts(args)[0] > 1 and not args.data_parallel_multi_port_external_lb


def api_processes(args: argparse.Namespace) -> list[Process]:
    """The API processes that vLLM 0.32.0 starts on this machine (entrypoints/cli/serve.py); none if it is headless.

    With a data-parallel supervisor, those of all its servers.
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
    """Numbers of API processes and engines on this machine."""
    if args.headless:
        return 0, args.data_parallel_size_local or 1
    api_servers, local = args.api_server_count, args.data_parallel_size_local
    if args.data_parallel_multi_port_external_lb:
        return local or 1, local or 1
    if args.data_parallel_external_lb or args.data_parallel_rank is not None:
        return api_servers or 1, 1
    if args.data_parallel_hybrid_lb or args.data_parallel_start_rank is not None:
        return api_servers or local or 1, local or 1
    engines = max(args.data_parallel_size // args.nnodes, 1) if local is None else local
    return 1 if args.enable_elastic_ep else api_servers or args.data_parallel_size, engines

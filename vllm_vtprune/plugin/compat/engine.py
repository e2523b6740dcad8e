"""vLLM's engine configuration: options that exclude pruning, and the placement of API processes and engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm import envs as vllm_envs
from vllm.config import KVTransferConfig, MultiModalConfig, ParallelConfig, VllmConfig
from vllm.platforms import Platform

from vllm_vtprune.plugin.compat.names import private, require

if TYPE_CHECKING:
    from vllm import LLM

require(ParallelConfig, "_api_process_rank", "_api_process_count")
require(Platform, "_enum")


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise for engine options that are incompatible with pruning (vLLM 0.32.0).

    - Encoder CUDA graphs bypass ``embed_multimodal`` (v1/worker).
    - LoRA of encoder and connector: the API process's encoder has no adapters.
    - vLLM's video pruning changes the embeddings of every image, and replaces our positions by its own, which are wrong
      for portrait images.
    - Weight transfer from a trainer: the API process's encoder reads checkpoints.
    - GPU video decoders use the memory that ``mm_ipc_gpu_memory_gb`` reserves for the API process's encoder.

    Raises:
        ValueError: names the option.
    """
    multimodal, transfer = vllm_config.model_config.multimodal_config, vllm_config.weight_transfer_config
    on = {
        "compilation_config.cudagraph_mm_encoder": vllm_config.compilation_config.cudagraph_mm_encoder,
        "enable_tower_connector_lora": vllm_config.lora_config and vllm_config.lora_config.enable_tower_connector_lora,
        "video_pruning_rate": multimodal and multimodal.video_pruning_rate,
        "weight_transfer_config.backend": transfer and transfer.backend,
        "media_io_kwargs.video.backend": multimodal and _gpu_video_backend(multimodal),
    }
    for name, value in on.items():
        if value:
            raise ValueError(
                f"{name}={value} cannot be combined with vllm-vtprune: turn it off, or run `vllm serve` with "
                "VLLM_PLUGINS set to a list without vtprune"
            )


def _gpu_video_backend(multimodal: MultiModalConfig) -> str:
    """The backend that decodes videos on the GPU; empty if none does."""
    if not multimodal.use_gpu_video_backend():
        return ""
    options = multimodal.media_io_kwargs.get("video", {})
    return str(options.get("backend") or options.get("video_backend") or vllm_envs.VLLM_VIDEO_LOADER_BACKEND)


def watch_requests(llm: LLM, note: Callable[[str, Any], None]) -> None:
    """Call ``note`` with the id and the processed prompt of each request to an `LLM` from now on.

    `LLM.generate` returns only the tokens of a prompt (vLLM 0.32.0). Remove when it returns what processors add.
    """
    processor = private(private(llm, "llm_engine"), "input_processor")
    process = private(processor, "process_inputs")

    def noting(request_id: str, prompt: Any, *arguments: Any, **named: Any) -> Any:
        note(request_id, prompt)
        return process(request_id, prompt, *arguments, **named)

    processor.process_inputs = noting


def counts_must_be_fixed(kv_transfer_config: KVTransferConfig | None) -> str:
    """The option that requires token counts independent of the features; empty if there is none.

    vLLM instances that exchange KV caches each encode an image, and features differ in their last bits. Counts computed
    from features may then differ between instances, and the KV caches would not match. Connectors that only offload
    within one instance are safe (names of vLLM 0.32.0). Remove when counts are sent with KV caches.
    """
    connector = None if kv_transfer_config is None else kv_transfer_config.kv_connector
    if connector in (None, "OffloadingConnector", "SimpleCPUOffloadConnector"):
        return ""
    return f"kv_transfer_config.kv_connector={connector}"


def api_process(parallel: ParallelConfig) -> tuple[int, int]:
    """Rank of this API process in its server, and the number of API processes.

    vLLM 0.32.0 keeps both in private fields (config/parallel.py); the rank is -1 in the launching process. Without
    them, each process would claim the memory of all. Remove when the fields are public.
    """
    return max(int(private(parallel, "_api_process_rank")), 0), int(private(parallel, "_api_process_count"))


def platform_name(platform: Platform) -> str:
    """Name of a vLLM platform, such as ``cuda`` or ``cpu``.

    vLLM 0.32.0 keeps it in a private field (platforms/interface.py) and has public predicates for some names only.
    Remove when the name is public.
    """
    return str(private(platform, "_enum").name).lower()

"""vLLM's configuration of its engines: which options exclude pruning, and where API processes and engines run."""

from __future__ import annotations

from vllm import envs as vllm_envs
from vllm.config import KVTransferConfig, MultiModalConfig, ParallelConfig, VllmConfig
from vllm.platforms import Platform

from vllm_vtprune import envs
from vllm_vtprune.plugin.compat.names import private, require

require(ParallelConfig, "_api_process_rank", "_api_process_count")
require(Platform, "_enum")


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise for engine options under which pruned embeddings would not reach the language model, or memory would fail.

    Raises:
        ValueError: encoder CUDA graphs (they bypass ``embed_multimodal``, vLLM 0.32.0 v1/worker), tower LoRA (the
            frontend tower has no adapters), vLLM's own pruning of videos (it changes the embeddings of every image,
            and its positions, which are wrong for portrait images, replace ours), weights that come from a trainer
            (the frontend tower reads checkpoints) or GPU video decoders (they take what ``mm_ipc_gpu_memory_gb``
            reserves for the frontend tower) are on; or tokens are to be selected in an engine that cannot place them.
    """
    multimodal, transfer = vllm_config.model_config.multimodal_config, vllm_config.weight_transfer_config
    on = {
        "compilation_config.cudagraph_mm_encoder": vllm_config.compilation_config.cudagraph_mm_encoder,
        "enable_tower_connector_lora": vllm_config.lora_config and vllm_config.lora_config.enable_tower_connector_lora,
        "video_pruning_rate": multimodal and multimodal.video_pruning_rate,
        "weight_transfer_config.backend": transfer and transfer.backend,
        "media_io_kwargs.video.backend": multimodal and _gpu_video_backend(multimodal),
    }
    if envs.placement() == "engine" and vllm_config.model_config.uses_mrope:
        pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
        if pipeline or not vllm_config.use_v2_model_runner:
            raise ValueError(
                "VTPRUNE_PLACEMENT=engine: this model has M-RoPE, for which vllm-vtprune selects tokens in the engine "
                "with Model Runner V2 and without pipeline parallelism only; expected auto or api"
            )
    for name, value in on.items():
        if value:
            raise ValueError(
                f"{name}={value} cannot be combined with vllm-vtprune: switch it off, or run `vllm serve` with "
                "VLLM_PLUGINS set to a list without vtprune"
            )


def _gpu_video_backend(multimodal: MultiModalConfig) -> str:
    """The backend that decodes videos on the GPU; empty where none does."""
    if not multimodal.use_gpu_video_backend():
        return ""
    options = multimodal.media_io_kwargs.get("video", {})
    return str(options.get("backend") or options.get("video_backend") or vllm_envs.VLLM_VIDEO_LOADER_BACKEND)


def counts_must_be_fixed(kv_transfer_config: KVTransferConfig | None) -> str:
    """The option because of which an image must keep a number of tokens that does not depend on its features.

    Where instances of vLLM exchange KV caches, each encodes an image for itself, and features differ in their last
    bits: counts that follow from them may then differ, and the caches with them. Empty where there is no such option;
    connectors that offload within one instance are none (names of vLLM 0.32.0). Can go when counts travel with caches.
    """
    connector = None if kv_transfer_config is None else kv_transfer_config.kv_connector
    if connector in (None, "OffloadingConnector", "SimpleCPUOffloadConnector"):
        return ""
    return f"kv_transfer_config.kv_connector={connector}"


def api_process(parallel: ParallelConfig) -> tuple[int, int]:
    """Rank of this API process among those of its server, and how many they are.

    vLLM 0.32.0 notes both in private fields (config/parallel.py), the rank as -1 in the process that starts the others.
    Without them each would take the memory of all. Can go when the fields are public.
    """
    return max(int(private(parallel, "_api_process_rank")), 0), int(private(parallel, "_api_process_count"))


def platform_name(platform: Platform) -> str:
    """Name of a platform that vLLM runs on, such as ``cuda`` or ``cpu``.

    vLLM 0.32.0 has it in a private field (platforms/interface.py) and public questions for some of the names alone. Can
    go when the name is public.
    """
    return str(private(platform, "_enum").name).lower()

"""What we touch of vLLM that is not a public interface, in one place.

Each entry names the version it was read in, why it is needed, and when it can go.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm import envs as vllm_envs
from vllm.config import KVTransferConfig, ModelConfig, MultiModalConfig, VllmConfig
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.models.registry import _MULTIMODAL_MODELS
from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.utils.cpu_resource_utils import get_memory_node_info

from vllm_vtprune import envs

_SYNTHETIC_UUID = re.compile(r"renderer-?\d+-mm-\d+-\w+-\d+")


def stock_factories(model_class: type) -> Any:
    """The factories (``info``, ``processor``, ``dummy_inputs``) with which a stock model class was registered.

    vLLM 0.32.0 stores them as ``_processor_factory`` (multimodal/registry.py). Needed to extend a stock processor
    without repeating its builder functions, which are private too. Can go when the registry offers a lookup.
    """
    return model_class._processor_factory  # type: ignore[attr-defined]


def multimodal_architectures() -> list[str]:
    """Architectures of all multimodal models that vLLM has; 0.32.0 lists them in a private table of its registry."""
    return list(_MULTIMODAL_MODELS)


def stock_model(architecture: str) -> type | None:
    """vLLM's own class for an architecture; None for one that it does not have.

    Our classes are registered in its place, so it is looked up in the table of `multimodal_architectures`.
    """
    if architecture not in _MULTIMODAL_MODELS:
        return None
    module, name = _MULTIMODAL_MODELS[architecture]
    path = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    model: type = getattr(importlib.import_module(path), name)
    return model


def without_synthetic_uuids(inputs: ProcessorInputs) -> ProcessorInputs:
    """The inputs, with the image ids removed that vLLM made up to avoid hashing.

    vLLM 0.32.0 invents an id per request and item when neither the processor cache nor prefix caching is on
    (renderers/base.py, ``_process_mm_uuids``). Such an id says nothing about the image; as a key of our feature cache
    it would never hit. Can go when the made-up ids are marked as such.
    """
    if not inputs.mm_uuid_items:
        return inputs
    uuid_items = {
        modality: [None if uuid and _SYNTHETIC_UUID.fullmatch(uuid) else uuid for uuid in uuids]
        for modality, uuids in inputs.mm_uuid_items.items()
    }
    return inputs if uuid_items == inputs.mm_uuid_items else replace(inputs, mm_uuid_items=uuid_items)


def cache_in_use(inputs: ProcessorInputs) -> BaseMultiModalProcessorCache | None:
    """The cache in which vLLM will look for the items of a prompt: none where any of its media come as embeddings.

    As vLLM 0.32.0 decides it (multimodal/processing/processor.py, ``_cached_apply_hf_processor``).
    """
    return None if any(items.get_passthrough_data() for items in inputs.mm_data_items.values()) else inputs.cache


def without_items(
    cache: BaseMultiModalProcessorCache, mm_hashes: Mapping[str, Sequence[str]]
) -> BaseMultiModalProcessorCache | None:
    """A processor cache that has none of some items: the same one, where it can forget them, else none.

    In vLLM 0.32.0 an item that is cached when a request begins may be driven out by others of the same request, which
    then fails on an assertion (multimodal/cache/lru.py), while the others are taken for sent. Can go when vLLM
    processes such an item again.
    """
    for mm_hash in (mm_hash for hashes in mm_hashes.values() for mm_hash in hashes):
        cache.invalidate(mm_hash)
    return None if any(any(cache.is_cached(list(hashes))) for hashes in mm_hashes.values()) else cache


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise for engine options under which pruned embeddings would not reach the language model, or memory would fail.

    Raises:
        ValueError: encoder CUDA graphs (they bypass ``embed_multimodal``, vLLM 0.32.0 v1/worker), tower LoRA (the
            frontend tower has no adapters), vLLM's own pruning of videos (it changes the embeddings of every image,
            and its positions, which are wrong for portrait images, replace ours), weights that come from a trainer
            (the frontend tower reads checkpoints) or GPU video decoders (they take what ``mm_ipc_gpu_memory_gb``
            reserves for the frontend tower) are on.
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


def tell_memory_of_cpu() -> None:
    """Have ``torch.accelerator.get_memory_info`` tell of the machine's memory, where there is no accelerator.

    Gemma 4 of vLLM 0.32.0 asks for it before it encodes (model_executor/models/gemma4_mm.py), and torch raises; only
    workers replace it (v1/worker/cpu/shm.py). Can go when the model asks vLLM's platform.
    """

    def available_and_total(device: object = None) -> tuple[int, int]:
        memory = get_memory_node_info()
        return memory.available_memory, memory.total_memory

    torch.accelerator.get_memory_info = available_and_total


@contextmanager
def rotary_embeddings_of_its_own() -> Iterator[None]:
    """A model that is built within takes no rotary embedding that another one made, and leaves none behind.

    vLLM 0.32.0 keeps them in one table of the process (layers/rotary_embedding/__init__.py). Those of a language model
    that is left out (``mm_encoder_only``) hold no data, and an engine in this process would take them for its own. Can
    go when vLLM does not keep what it leaves out.
    """
    others = dict(rotary_embedding._ROPE_DICT)
    rotary_embedding._ROPE_DICT.clear()
    try:
        yield
    finally:
        rotary_embedding._ROPE_DICT.clear()
        rotary_embedding._ROPE_DICT.update(others)


def model_name(model_config: ModelConfig) -> str:
    """The name under which vLLM's own metrics label the model."""
    served = model_config.served_model_name
    return served[0] if isinstance(served, list) else served or model_config.model


def is_starting(model: Any) -> bool:
    """Whether a model of the engine is being built: vLLM 0.32.0 puts it into evaluation mode when it has its weights.

    (model_executor/model_loader/base_loader.py). Can go when a model is told that it is loaded anew.
    """
    return bool(model.training)


def come_from_checkpoint(weights: object) -> bool:
    """Whether weights that are loaded into a model are read from a checkpoint, and not handed in by somebody.

    vLLM 0.32.0 reads checkpoints with the loaders' generator ``get_all_weights``
    (model_executor/model_loader/reload/inplace.py). Can go when the model is told where they come from.
    """
    return getattr(weights, "__name__", None) == "get_all_weights"


def model_directory(model_config: ModelConfig) -> Path:
    """The local directory of a model's files; downloads what the tower needs of a model on a hub, as vLLM does."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model_config.model,
            revision=model_config.revision,
            cache_dir=envs.download_dir(),
            allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"],
        )
    )


def engine_client_is_stopped(app_state: Any) -> bool:
    """Whether a server that is shutting down has stopped its engine client, after which no more tokens come.

    vLLM 0.32.0 (entrypoints/launchers/launcher.py) keeps its uvicorn server in ``app.state.server`` and has it exit at
    that point. Can go with `fail_unfinished_requests`.
    """
    server = getattr(app_state, "server", None)
    return server is not None and server.should_exit


def fail_unfinished_requests(engine_client: Any, error: Exception) -> None:
    """Have every request that still waits for the engine raise ``error``.

    vLLM 0.32.0 stops the task that hands out the engine's outputs when it stops the engine, so requests that were not
    finished by then wait for ever, and their clients with them, until someone kills the server. Can go when vLLM ends
    them itself.
    """
    engine_client.output_processor.propagate_error(error)


def after_images_were_sent(engine_client: Any, callback: Callable[[str], None]) -> None:
    """Have a callback told the hash of each image whose data was handed to the engine, in the order of the requests.

    vLLM 0.32.0 and 0.33.0 send requests over one ordered connection (v1/engine/core_client.py) and tell nobody. Needed
    to know what the engine has: vLLM notes an image before (renderers/base.py), so that one whose request is refused or
    given up in between is taken for sent. Can go when vLLM notes it when it is sent.
    """
    core = engine_client.engine_core
    send = core.add_request_async

    async def add_request_async(request: Any) -> None:
        await send(request)
        for feature in request.mm_features or ():
            if feature.data is not None:
                callback(feature.mm_hash or feature.identifier)

    core.add_request_async = add_request_async


def before_shutdown(engine_client: Any, callback: Callable[[], None]) -> None:
    """Have a callback run when the engine client begins to shut down.

    vLLM 0.32.0 shuts it down before the server where that is told to stop, and after it where that ends by itself, as
    the engine died (entrypoints/launchers/launcher.py). Both end with status 0. What is shut down first is the renderer
    (v1/engine/async_llm.py), which closes ``_resources`` (renderers/base.py). Can go when vLLM's server ends with
    another status where its engine died.
    """
    engine_client.renderer._resources.callback(callback)


def says_shut_down(error: Exception) -> bool:
    """Whether a request came when a server that finishes others had stopped rendering.

    vLLM 0.32.0 shuts down the renderer's threads first (v1/engine/async_llm.py) and answers what comes then with status
    500. Can go when it answers 503.
    """
    return isinstance(error, RuntimeError) and "cannot schedule new futures after" in str(error)


class PropagatesCurrentSpan:
    """Mixin before a serving class of vLLM: what its engine client traces is below the current span.

    vLLM 0.32.0 hands the engine only what the HTTP request carries (entrypoints/serve/engine/serving.py,
    ``_get_trace_headers``), so that its ``llm_request`` would be a trace of its own. Can go when it looks at the
    current span.
    """

    async def _get_trace_headers(self, headers: Mapping[str, str]) -> Mapping[str, str] | None:
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier or None

"""What we touch of vLLM that is not a public interface, in one place.

Each entry names the version it was read in, why it is needed, and when it can go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fusion.mm_input_norm import _load_norm_params
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune import envs
from vllm_vtprune.towers.base import PixelNorm, VisionTower, load_tower

logger = init_logger("vllm.vtprune")

TESTED_VLLM = "0.32"

_SYNTHETIC_UUID = re.compile(r"renderer-?\d+-mm-\d+-\w+-\d+")


def stock_factories(model_class: type) -> Any:
    """The factories (``info``, ``processor``, ``dummy_inputs``) with which a stock model class was registered.

    vLLM 0.32.0 stores them as ``_processor_factory`` (multimodal/registry.py). Needed to extend a stock processor
    without repeating its builder functions, which are private too. Can go when the registry offers a lookup.
    """
    return model_class._processor_factory  # type: ignore[attr-defined]


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


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise for engine options under which pruned embeddings would not reach the language model.

    Raises:
        ValueError: encoder CUDA graphs (they bypass ``embed_multimodal``, vLLM 0.32.0 v1/worker), tower LoRA (the
            frontend tower has no adapters) or vLLM's own pruning of videos (it changes the embeddings of every image,
            and its positions, which are wrong for portrait images, replace ours) are on.
    """
    remedy = "switch it off, or run `vllm serve` with VLLM_PLUGINS set to a list without vtprune"
    if getattr(vllm_config.compilation_config, "cudagraph_mm_encoder", False):
        raise ValueError(f"compilation_config.cudagraph_mm_encoder=True cannot be combined with vllm-vtprune: {remedy}")
    lora = vllm_config.lora_config
    if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        raise ValueError(f"enable_tower_connector_lora=True cannot be combined with vllm-vtprune: {remedy}")
    rate = getattr(vllm_config.model_config.multimodal_config, "video_pruning_rate", None)
    if rate:
        raise ValueError(f"video_pruning_rate={rate} cannot be combined with vllm-vtprune: {remedy}")


def model_name(model_config: ModelConfig) -> str:
    """The name under which vLLM's own metrics label the model."""
    served = model_config.served_model_name
    return served[0] if isinstance(served, list) else served or model_config.model


def transports_device_tensors(model_config: ModelConfig) -> bool:
    """Whether items may stay on the GPU on their way to the engine (0.32.0: ``mm_tensor_ipc="torch_shm"``)."""
    return bool(model_config.get_multimodal_config().mm_tensor_ipc == "torch_shm")


def pixel_norm(model_config: ModelConfig) -> PixelNorm | None:
    """How the model normalises pixels, where it does that and not the image processor.

    vLLM 0.32.0 leaves it to the models that can (``mm_device_do_normalize``, on by default), with numbers from
    ``_load_norm_params`` (model_executor/layers/fusion/mm_input_norm.py). Can go when images come normalised or the
    numbers are public.
    """
    if not model_config.get_multimodal_config().mm_device_do_normalize:
        return None
    found = _load_norm_params(model_config)
    if found.is_identity:
        return None
    return PixelNorm(tuple(found.image_mean), tuple(found.image_std), found.rescale_factor)


def load_tower_of(model_config: ModelConfig, architecture: str) -> VisionTower:
    """Load the frontend tower of a model as the engine loads the model itself.

    The processor sees the model's config but not its ``load_format`` or ``download_dir`` (vLLM 0.32.0,
    ``InputProcessingContext``), so those come from the environment, where `vtprune serve` puts them. Can go when the
    context carries the load config.

    Raises:
        TowerError: the weights are not there or do not fit.
    """
    load_format = envs.load_format()
    tower = load_tower(
        Path() if load_format == "dummy" else _model_directory(model_config),
        architecture=architecture,
        hf_config=model_config.hf_config,
        dtype=model_config.dtype,
        device=envs.device(),
        load_format=load_format,
        seed=model_config.seed,
        pixel_norm=pixel_norm(model_config),
    )
    logger.info("Frontend vision tower loaded: %s weights, %s, %s", tower.weights, tower.device, tower.dtype)
    return tower


def _model_directory(model_config: ModelConfig) -> Path:
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


def api_process(engine_client: Any) -> str:
    """Which of several API processes this one is; empty where it is the only one.

    vLLM 0.32.0 numbers them in the parallel config alone.
    """
    parallel = engine_client.vllm_config.parallel_config
    return str(parallel._api_process_rank) if parallel._api_process_count > 1 else ""


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

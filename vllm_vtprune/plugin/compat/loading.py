"""vLLM's loading of models and weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.utils.cpu_resource_utils import get_memory_node_info

from vllm_vtprune import envs
from vllm_vtprune.plugin.compat.names import private, require

require(DefaultModelLoader, "get_all_weights")


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
    table: dict[Any, Any] = private(rotary_embedding, "_ROPE_DICT")
    others = dict(table)
    table.clear()
    try:
        yield
    finally:
        table.clear()
        table.update(others)


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
    return getattr(weights, "__name__", None) == DefaultModelLoader.get_all_weights.__name__


def model_directory(model_config: ModelConfig) -> Path:
    """The local directory of a model's files; downloads what the tower needs of a model on a hub.

    As vLLM 0.32.0 does it (model_executor/model_loader/weight_utils.py), whose loaders keep the directory to
    themselves. Can go when a loader tells it.
    """
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

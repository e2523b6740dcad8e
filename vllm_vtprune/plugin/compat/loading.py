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
from vllm_vtprune.token_table import TokenTable

require(DefaultModelLoader, "get_all_weights")


def report_cpu_memory() -> None:
    """Make ``torch.accelerator.get_memory_info`` report the machine's memory on machines without an accelerator.

    vLLM 0.32.0's Gemma 4 calls it before encoding (model_executor/models/gemma4_mm.py), and torch raises; vLLM replaces
    it in workers only (v1/worker/cpu/shm.py). Remove when the model queries vLLM's platform.
    """

    def available_and_total(device: object = None) -> tuple[int, int]:
        memory = get_memory_node_info()
        return memory.available_memory, memory.total_memory

    torch.accelerator.get_memory_info = available_and_total


@contextmanager
def private_rotary_embeddings() -> Iterator[None]:
    """A model built in this context shares no rotary embeddings with other models.

    vLLM 0.32.0 shares them through a table of the process (layers/rotary_embedding/__init__.py). Those of an omitted
    language model (``mm_encoder_only``) hold no data, and an engine in this process would reuse them. Remove when vLLM
    does not share them.
    """
    table: dict[Any, Any] = private(rotary_embedding, "_ROPE_DICT")
    saved = dict(table)
    table.clear()
    try:
        yield
    finally:
        table.clear()
        table.update(saved)


def is_starting(model: Any) -> bool:
    """Whether an engine's model is being built, as opposed to reloaded.

    vLLM 0.32.0 switches it to evaluation mode after the first load (model_executor/model_loader/base_loader.py). Remove
    when vLLM tells a model that it is reloaded.
    """
    return bool(model.training)


def are_from_checkpoint(weights: object) -> bool:
    """Whether weights are read from a checkpoint, as opposed to passed in by a caller.

    vLLM 0.32.0 reads checkpoints with the loaders' generator ``get_all_weights``
    (model_executor/model_loader/reload/inplace.py). Remove when vLLM tells the model their source.
    """
    return getattr(weights, "__name__", None) == DefaultModelLoader.get_all_weights.__name__


def token_table(model_config: ModelConfig) -> TokenTable:
    """The input embeddings of a model's language model, from its checkpoint; random with the load format dummy.

    Raises:
        EncoderError: the checkpoint holds no such table.
    """
    text = model_config.hf_text_config
    if envs.load_format() == "dummy":
        return TokenTable.random(text.vocab_size, text.hidden_size, model_config.seed)
    return TokenTable.of_checkpoint(model_directory(model_config), text.hidden_size)


def model_directory(model_config: ModelConfig) -> Path:
    """The local directory of a model's files; downloads the needed files of a model on a hub.

    As in vLLM 0.32.0 (model_executor/model_loader/weight_utils.py), whose loaders do not expose the directory. Remove
    when a loader does.
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

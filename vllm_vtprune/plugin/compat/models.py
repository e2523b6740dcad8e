"""vLLM's tables of models and of their processors."""

from __future__ import annotations

import importlib
from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models import registry
from vllm.model_executor.models.interfaces import SupportsMultiModal

from vllm_vtprune.plugin.compat.names import private, require

require(SupportsMultiModal, "_processor_factory")


def stock_factories(model_class: type) -> Any:
    """The processor factories (``info``, ``processor``, ``dummy_inputs``) of a stock model class.

    vLLM 0.32.0 stores them as ``_processor_factory`` (multimodal/registry.py). Needed to extend a stock processor
    without copying its private builder functions. Remove when the registry offers a lookup.
    """
    return private(model_class, "_processor_factory")


def has_stock_factories(model_class: type) -> bool:
    """Whether a class has processor factories; some models of vLLM 0.32.0 have none, or register them later."""
    return hasattr(model_class, "_processor_factory")


def multimodal_architectures() -> list[str]:
    """vLLM's multimodal architectures.

    vLLM 0.32.0 lists them in a private table. An architecture that we missed would be served by vLLM's own class, which
    ignores policies. Remove when the registry offers a list.
    """
    return list(_table())


def stock_model(architecture: str) -> type | None:
    """vLLM's own class of an architecture; None if vLLM has none.

    The public registry returns our class, so this reads the table of `multimodal_architectures`.
    """
    if architecture not in _table():
        return None
    module, name = _table()[architecture]
    path = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    model: type = getattr(importlib.import_module(path), name)
    return model


def _table() -> dict[str, tuple[str, str]]:
    table: dict[str, tuple[str, str]] = private(registry, "_MULTIMODAL_MODELS")
    return table


def model_name(model_config: ModelConfig) -> str:
    """The model's label in vLLM's metrics.

    As in vLLM 0.32.0 (config/model.py, ``get_served_model_name``): the configuration may hold a list.
    """
    served = model_config.served_model_name
    return served[0] if isinstance(served, list) else served or model_config.model

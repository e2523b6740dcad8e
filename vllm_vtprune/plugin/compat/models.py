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
    """The factories (``info``, ``processor``, ``dummy_inputs``) with which a stock model class was registered.

    vLLM 0.32.0 stores them as ``_processor_factory`` (multimodal/registry.py). Needed to extend a stock processor
    without repeating its builder functions, which are private too. Can go when the registry offers a lookup.
    """
    return private(model_class, "_processor_factory")


def has_stock_factories(model_class: type) -> bool:
    """Whether a class was registered with factories; vLLM 0.32.0 has models whose modules do so for none or later."""
    return hasattr(model_class, "_processor_factory")


def multimodal_architectures() -> list[str]:
    """Architectures of all multimodal models that vLLM has.

    vLLM 0.32.0 lists them in a private table of its registry. One that is missed is served by vLLM's own class, which
    ignores policies. Can go when the registry offers a list.
    """
    return list(_table())


def stock_model(architecture: str) -> type | None:
    """vLLM's own class for an architecture; None for one that it does not have.

    Our classes are registered in its place, so it is looked up in the table of `multimodal_architectures`.
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
    """The name under which vLLM's own metrics label the model.

    As vLLM 0.32.0 chooses it (config/model.py, ``get_served_model_name``): the configuration may hold a list.
    """
    served = model_config.served_model_name
    return served[0] if isinstance(served, list) else served or model_config.model

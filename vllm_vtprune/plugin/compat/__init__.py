"""All uses of vLLM's private interfaces, by area.

Each entry states the problem it solves, the vLLM version in which it was read, and when to remove it. `names` checks
private names at import or first use, in every tested version. `tests/test_compat.py` checks the error texts that
entries match. `server` holds what only servers need.
"""

from vllm_vtprune.plugin.compat.engine import (
    api_process,
    counts_must_be_fixed,
    platform_name,
    refuse_unsupported,
    watch_requests,
)
from vllm_vtprune.plugin.compat.models import (
    has_stock_factories,
    model_name,
    multimodal_architectures,
    stock_factories,
    stock_model,
)
from vllm_vtprune.plugin.compat.multimodal import (
    PROCESSOR_HOOKS,
    cache_in_use,
    missing_item,
    placeholder_is_missing,
    without_items,
    without_synthetic_uuids,
)
from vllm_vtprune.plugin.compat.names import VllmChanged

__all__ = [
    "PROCESSOR_HOOKS",
    "VllmChanged",
    "api_process",
    "cache_in_use",
    "counts_must_be_fixed",
    "has_stock_factories",
    "missing_item",
    "model_name",
    "multimodal_architectures",
    "placeholder_is_missing",
    "platform_name",
    "refuse_unsupported",
    "stock_factories",
    "stock_model",
    "watch_requests",
    "without_items",
    "without_synthetic_uuids",
]

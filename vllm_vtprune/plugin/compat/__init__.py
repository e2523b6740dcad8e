"""What we touch of vLLM that is not a public interface, by area.

Each entry says what goes wrong without it, the version that it was read in, and when it can go. Private names are
checked when a module is imported or an object is met (`names`), in every version of vLLM that is tested; sentences of
vLLM's that an entry matches are checked by `tests/test_compat.py`. What only servers need is in `server`.
"""

from vllm_vtprune.plugin.compat.engine import (
    api_process,
    counts_must_be_fixed,
    platform_name,
    refuse_unsupported,
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
    lost_place_of_medium,
    says_data_is_missing,
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
    "lost_place_of_medium",
    "model_name",
    "multimodal_architectures",
    "platform_name",
    "refuse_unsupported",
    "says_data_is_missing",
    "stock_factories",
    "stock_model",
    "without_items",
    "without_synthetic_uuids",
]

"""Training-free visual token pruning for vLLM: how many visual tokens an image needs, and which ones stay.

The names below load on first use, so that importing the package needs neither torch nor pydantic. Nothing outside
``vllm_vtprune.plugin`` imports vLLM.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_vtprune.features import VisualFeatures
    from vllm_vtprune.plan import PruningPlan, plan_tokens
    from vllm_vtprune.plugin.inspection import Inspection, Reports, inspect
    from vllm_vtprune.policy import PruningPolicy

__version__ = "0.1.0"
__all__ = [
    "Inspection", "PruningPlan", "PruningPolicy", "Reports", "VisualFeatures", "__version__", "inspect", "plan_tokens",
]  # fmt: skip

_HOME = {
    "PruningPolicy": "policy",
    "VisualFeatures": "features",
    "PruningPlan": "plan",
    "plan_tokens": "plan",
    "Inspection": "plugin.inspection",
    "Reports": "plugin.inspection",
    "inspect": "plugin.inspection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

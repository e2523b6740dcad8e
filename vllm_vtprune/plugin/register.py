"""The `vllm.general_plugins` entry point: tells vLLM which classes serve the architectures we prune.

vLLM calls `register` in every process, possibly more than once, before it looks a model up.
"""

from __future__ import annotations

from vllm_vtprune.families import ARCHITECTURES
from vllm_vtprune.plugin.loads import name_files
from vllm_vtprune.plugin.unserved import warn_where_policies_are_ignored
from vllm_vtprune.plugin.version import require_tested_vllm

GENERIC = "vllm_vtprune.plugin.families.generic"


def register() -> None:
    """Have vLLM serve each multimodal architecture by our subclass, which is the stock class where nothing is pruned.

    vLLM passes an error on to whoever starts it, so that no model is served unpruned unnoticed.

    Raises:
        UntestedVllmError: the plugin was not tested with this vLLM.
    """
    require_tested_vllm()
    from vllm import ModelRegistry

    from vllm_vtprune.plugin.compat import multimodal_architectures

    name_files()
    for architecture in multimodal_architectures():
        target = ARCHITECTURES.get(architecture, f"{GENERIC}:{architecture}")
        ModelRegistry.register_model(architecture, target)
    warn_where_policies_are_ignored()

"""The `vllm.general_plugins` entry point: registers our model classes.

vLLM calls `register` in every process, possibly more than once, before it looks up a model.
"""

from __future__ import annotations

from vllm_vtprune.families import ARCHITECTURES
from vllm_vtprune.plugin.loads import notes_prefix
from vllm_vtprune.plugin.unserved import warn_where_policies_are_ignored
from vllm_vtprune.plugin.version import require_tested_vllm

GENERIC = "vllm_vtprune.plugin.families.generic"


def register() -> None:
    """Register our class for each multimodal architecture; an architecture that cannot be pruned keeps vLLM's class.

    An error stops vLLM, so no model is silently served unpruned.

    Raises:
        UntestedVllmError: the plugin was not tested with the installed vLLM.
    """
    require_tested_vllm()
    from vllm import ModelRegistry

    from vllm_vtprune.plugin.compat import multimodal_architectures

    notes_prefix()
    for architecture in multimodal_architectures():
        target = ARCHITECTURES.get(architecture, f"{GENERIC}:{architecture}")
        ModelRegistry.register_model(architecture, target)
    warn_where_policies_are_ignored()

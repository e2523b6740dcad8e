"""The `vllm.general_plugins` entry point: tells vLLM which classes serve the architectures we prune.

vLLM calls `register` in every process, possibly more than once, before it looks a model up.
"""

from __future__ import annotations

from vllm_vtprune.plugin.loads import name_files
from vllm_vtprune.plugin.unserved import warn_where_policies_are_ignored
from vllm_vtprune.plugin.version import require_tested_vllm

ARCHITECTURES: dict[str, str] = {
    "LlavaForConditionalGeneration": "vllm_vtprune.plugin.llava:PrunedLlavaForConditionalGeneration",
    "InternVLForConditionalGeneration": "vllm_vtprune.plugin.internvl:PrunedInternVLForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "vllm_vtprune.plugin.llava_next:PrunedLlavaNextForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "vllm_vtprune.plugin.qwen3_vl:PrunedQwen3VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "vllm_vtprune.plugin.qwen2_5_vl:PrunedQwen2_5_VLForConditionalGeneration",
}
"""Architecture of a checkpoint -> the class that serves it, as ``module:class`` so that nothing is imported early."""


def register() -> None:
    """Have vLLM serve each architecture by our subclass, which is the stock class where nothing is pruned.

    vLLM passes an error on to whoever starts it, so that no model is served unpruned unnoticed.

    Raises:
        UntestedVllmError: the plugin was not tested with this vLLM.
    """
    require_tested_vllm()
    from vllm import ModelRegistry

    name_files()
    for architecture, target in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, target)
    warn_where_policies_are_ignored()

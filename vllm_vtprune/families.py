"""The model families that can be pruned, by the names of their modules, and the architectures of their checkpoints."""

from __future__ import annotations

FAMILIES: dict[str, tuple[str, ...]] = {
    "llava": ("LlavaForConditionalGeneration",),
    "llava_next": ("LlavaNextForConditionalGeneration",),
    "internvl": ("InternVLForConditionalGeneration",),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration",),
}

ARCHITECTURES: dict[str, str] = {
    architecture: f"vllm_vtprune.plugin.families.{family}:Pruned{architecture}"
    for family, architectures in FAMILIES.items()
    for architecture in architectures
}
"""Architecture of a checkpoint -> the class that serves it, as ``module:class`` so that nothing is imported early."""

"""The supported model families, by module name, and the architectures of their checkpoints."""

from __future__ import annotations

FAMILIES: dict[str, tuple[str, ...]] = {
    "llava": ("LlavaForConditionalGeneration",),
    "llava_next": ("LlavaNextForConditionalGeneration",),
    "llava_onevision": ("LlavaOnevisionForConditionalGeneration",),
    "internvl": ("InternVLForConditionalGeneration",),
    "internvl_chat": ("InternVLChatModel",),
    "glm4v": ("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration"),
    "gemma3": ("Gemma3ForConditionalGeneration",),
    "gemma4": ("Gemma4ForConditionalGeneration",),
    "mistral3": ("Mistral3ForConditionalGeneration",),
    "idefics3": ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
}

ARCHITECTURES: dict[str, str] = {
    architecture: f"vllm_vtprune.plugin.families.{family}:Pruned{architecture}"
    for family, architectures in FAMILIES.items()
    for architecture in architectures
}
"""Architecture of a checkpoint -> our model class as ``module:class``, imported by vLLM on use."""

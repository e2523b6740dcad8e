"""The model families of which a tiny checkpoint can be made on the spot."""

DEFAULT = "llava"

FAMILIES = {
    "llava": "vllm_vtprune.demo.checkpoint:write_llava_checkpoint",
    "llava_next": "vllm_vtprune.demo.llava_next:write_llava_next_checkpoint",
    "internvl": "vllm_vtprune.demo.internvl:write_internvl_checkpoint",
    "qwen2_5_vl": "vllm_vtprune.demo.qwen2_5_vl:write_qwen2_5_vl_checkpoint",
}
"""Family -> the function that writes its tiny checkpoint into a directory, as ``module:function``."""

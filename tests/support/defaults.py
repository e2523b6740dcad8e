"""What kinds of model families give to methods, for tests that need no model."""

from vllm_vtprune.policy import FamilyDefaults

QWEN = FamilyDefaults(
    clip_alpha=0.3, provides=frozenset({"grid", "positions", "dynamic_resolution"}), drops_duplicates=True
)
TILED = FamilyDefaults(clip_alpha=0.3, provides=frozenset({"cls_attention", "overview_attention", "keys", "positions"}))

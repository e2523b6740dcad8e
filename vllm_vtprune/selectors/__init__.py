"""Selection methods: one method per file, and a registry that says what each needs and which laws it obeys."""

from vllm_vtprune.selectors.registry import METHODS, SELECTORS, MethodSpec

__all__ = ["METHODS", "SELECTORS", "MethodSpec"]

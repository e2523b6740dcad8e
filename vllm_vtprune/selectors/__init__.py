"""Selection methods: one per file, with its parameters, required inputs and properties."""

from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.registry import METHODS, SELECTORS

__all__ = ["METHODS", "SELECTORS", "Method"]

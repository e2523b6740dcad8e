"""Selection methods: one method per file, with its parameters, what it needs and the laws that it obeys."""

from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.registry import METHODS, SELECTORS

__all__ = ["METHODS", "SELECTORS", "Method"]

"""Check vLLM's private names: fail at once, and name the one that a vLLM release has removed."""

from __future__ import annotations

from typing import Any

from vllm_vtprune import __version__
from vllm_vtprune.plugin.version import TESTED, installed_vllm


class VllmChanged(RuntimeError):
    """The installed vLLM does not have a name that this package uses."""

    def __init__(self, owner: object, name: str) -> None:
        path = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        super().__init__(
            f"vLLM {installed_vllm()} has no {path}.{name}, which vllm-vtprune {__version__} uses "
            f"(vllm_vtprune/plugin/compat): install vLLM {' or '.join(TESTED)}, or a newer vllm-vtprune"
        )


def require(owner: Any, *names: str) -> None:
    """Check that a vLLM class or module has these names, or annotates them as instance attributes.

    Raises:
        VllmChanged: a name is missing.
    """
    for name in names:
        declared = any(name in vars(base).get("__annotations__", {}) for base in getattr(owner, "__mro__", (owner,)))
        if not declared and not hasattr(owner, name):
            raise VllmChanged(owner, name)


def private(owner: object, name: str) -> Any:
    """A private attribute of a vLLM object.

    Raises:
        VllmChanged: the object has no such attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise VllmChanged(owner, name) from None

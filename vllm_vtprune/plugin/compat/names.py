"""The check of every private name of vLLM: a release without it stops us at once, with a message that names it."""

from __future__ import annotations

from typing import Any

from vllm_vtprune import __version__
from vllm_vtprune.plugin.version import TESTED, installed_vllm


class VllmChanged(RuntimeError):
    """The installed vLLM does not have a name that this package uses."""

    def __init__(self, owner: object, name: str) -> None:
        where = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        super().__init__(
            f"vLLM {installed_vllm()} has no {where}.{name}, which vllm-vtprune {__version__} uses "
            f"(vllm_vtprune/plugin/compat): install vLLM {' or '.join(TESTED)}, or a newer vllm-vtprune"
        )


def require(owner: Any, *names: str) -> None:
    """Check that a class or module of vLLM has these names, or declares them for its instances.

    Raises:
        VllmChanged: one is missing.
    """
    for name in names:
        declared = any(name in vars(base).get("__annotations__", {}) for base in getattr(owner, "__mro__", (owner,)))
        if not declared and not hasattr(owner, name):
            raise VllmChanged(owner, name)


def private(owner: object, name: str) -> Any:
    """An attribute of an object of vLLM's that is not public.

    Raises:
        VllmChanged: there is none of this name.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise VllmChanged(owner, name) from None

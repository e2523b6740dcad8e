"""Programs of vLLM that load the plugin without the routes that read the ``pruning`` field, and so ignore it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import parent_process
from pathlib import Path


def warn_where_policies_are_ignored() -> None:
    """Log one warning in a server without our routes, and in vLLM's batch runner; nothing elsewhere.

    vLLM loads routes of plugins only where ``VLLM_PLUGINS`` names them, and in its batch runner never. Its engines and
    further API processes are children of the process that says so.
    """
    if parent_process() is None and (warning := ignored_by(sys.argv, sys.modules, os.environ)):
        from vllm.logger import init_logger

        init_logger("vllm.vtprune").warning(warning)


def ignored_by(arguments: Sequence[str], modules: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    """What to say of a program that ignores policies; None for any other.

    Args:
        arguments: its command line, its own name first.
        modules: what it has imported, by name.
        environment: its variables.
    """
    name, command = Path(arguments[0]).stem, arguments[1:2]
    of_vllm = "vllm.entrypoints.cli.main" in modules or name in ("vllm", "api_server", "run_batch")
    if not of_vllm:
        return None
    if command == ["run-batch"] or name == "run_batch":
        return (
            "vtprune: run-batch PRUNES NOTHING and ignores the field `pruning` of its requests, valid or not: "
            "send them to `vtprune serve`"
        )
    if (command == ["serve"] or name == "api_server") and "VLLM_PLUGINS" not in environment:
        return (
            "vtprune: this server PRUNES NOTHING and ignores the field `pruning` of requests: its routes are vLLM's "
            "own. Start it with `vtprune serve`, or with VLLM_PLUGINS naming vtprune"
        )
    return None

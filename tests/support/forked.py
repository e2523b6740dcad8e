"""Fresh processes that import nothing: they are forked from one that has imported vLLM, and torch with it.

Each starts as a new Python would, with vLLM's modules but none of its plugins loaded.
"""

import os
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

TIMEOUT = 300  # seconds


def context() -> ForkServerContext:
    """The context of such processes."""
    forking = get_context("forkserver")
    forking.set_forkserver_preload(["vllm.entrypoints.cli.serve", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine"])
    return forking


def run_cli(*arguments: str, before: str = "") -> CompletedProcess[str]:
    """Run ``vtprune ARGUMENTS`` to its end, after the Python code `before`."""
    return run(f"{before}\nfrom vllm_vtprune.cli import main\nmain({arguments!r})")


def run(code: str) -> CompletedProcess[str]:
    """Run Python code to its end, in a process of its own."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        process = context().Process(target=_run, args=(folder, code, dict(os.environ)))
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        outputs = [(folder / stream).read_text() for stream in ("stdout", "stderr")]
        return CompletedProcess(code, process.exitcode or 0, *outputs)


def prepare(variables: Mapping[str, str]) -> None:
    """Set the environment variables of a new process, which has its parent's, and have it inspect models itself.

    vLLM would inspect them in another process, which has to import vLLM anew.
    """
    os.environ.clear()
    os.environ.update(variables)
    from vllm.model_executor.models import registry  # reads the variables, unless forked

    registry._run_in_subprocess = lambda function: function()


def _run(folder: Path, code: str, environment: Mapping[str, str]) -> None:
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), descriptor)
    prepare(environment)
    exec(code, {})

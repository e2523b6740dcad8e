"""Lets a test look into the processes of a vLLM engine: the engine core's and its worker's.

Workers import this before they build a model, and with it the stand-in of `tests.support.linear_attention`.
"""

import gc
import os
import sys
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

import tests.support.linear_attention  # noqa: F401


def state(model: object = None) -> dict[str, Any]:
    """What this process holds of the package: its modules, runtimes and loaded vision encoders."""
    runtime_class = getattr(sys.modules.get("vllm_vtprune.runtime"), "PruningRuntime", None)
    gc.unfreeze()  # an engine in this process has hidden what it found when it started
    runtimes = [instance for instance in gc.get_objects() if type(instance) is runtime_class]
    return {
        "pid": os.getpid(),
        "modules": sorted(name for name in sys.modules if name.startswith("vllm_vtprune.")),
        "runtimes": len(runtimes),
        "vision_encoders": sum(runtime.encoder.num_parameters is not None for runtime in runtimes),
        "model_class": None if model is None else f"{type(model).__module__}.{type(model).__name__}",
    }


class ObservedWorker:
    """`worker_extension_cls`: adds a method to the worker."""

    def worker_state(self) -> dict[str, Any]:
        runner = self.model_runner  # type: ignore[attr-defined]
        return {**state(runner.get_model()), "model_runner": type(runner).__module__}

    def kept_tokens(self) -> list[list[int]]:
        """Which tokens the engine has kept of each image that it pruned, in the order in which it did."""
        table = self.model_runner.get_model()._selector._kept  # type: ignore[attr-defined]
        return [table.get(key).tolist() for key in table]


class ObservedExecutor(MultiprocExecutor):
    """`distributed_executor_backend`: the one that vLLM picks on a CPU, which also answers for the engine core."""

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return [state()] if method == "engine_core_state" else super().collective_rpc(method, *args, **kwargs)

"""Follow weight changes of a running engine.

vLLM can load other weights into a running engine (``reload_weights``, or any call of a model's ``load_weights``). The
API process holds a copy of the vision encoder's weights. So workers record each load in a file, and the API process
checks the file before it prunes: one system call per request.

Ray workers may run on other machines, so they refuse to replace weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger

from vllm_vtprune.plugin.compat import loading
from vllm_vtprune.plugin.loads import Load, LoadNotes
from vllm_vtprune.runtime import PruningRuntime

logger = init_logger("vllm.vtprune")


class WeightsNotInCheckpoint(GracefulHTTPError):
    """The engine's weights come from no checkpoint, so the API process cannot load its vision encoder."""

    def __init__(self) -> None:
        super().__init__(
            "The engine's weights were replaced by weights that are in no checkpoint, so the API process cannot load "
            "its vision encoder: images cannot be pruned until reload_weights loads a checkpoint.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


class EngineWeights:
    """The engine's current weights, as a process that encodes for it knows them.

    Args:
        model: what the engine started with.
        from_start: see `LoadNotes`.
    """

    def __init__(self, model: str, *, from_start: bool = False) -> None:
        self._notes = LoadNotes(model, from_start=from_start)
        self.load = Load(model, from_checkpoint=True)

    def follow(self, runtime: PruningRuntime, *, selects: bool) -> None:
        """Reset the runtime if the engine has loaded other weights.

        Args:
            runtime: forgets its encoder and caches.
            selects: whether the request needs features.

        Raises:
            WeightsNotInCheckpoint: features are needed, and the engine's weights are in no checkpoint.
        """
        load = self._notes.latest()
        if load is not None:
            logger.info("The engine loaded %s: the vision encoder will be reloaded", load.model)
            self.load = load
            runtime.renew()
        if selects and not self.load.from_checkpoint:
            raise WeightsNotInCheckpoint


class RecordsLoads:
    """Mixin before a stock model: records every load of weights after the first."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._model_config = vllm_config.model_config  # vLLM updates its `model` on reload
        self._load_notes = LoadNotes(vllm_config.model_config.model)
        self._started_by_ray = vllm_config.parallel_config.distributed_executor_backend == "ray"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load weights as the stock model does.

        Raises:
            RuntimeError: Ray started this worker, and the model already has weights.
        """
        starting = loading.is_starting(self)
        if self._started_by_ray and not starting:
            raise RuntimeError(
                "vllm-vtprune cannot replace weights of an engine on Ray, because its API process would not notice: "
                "restart the engine, or start it with VLLM_PLUGINS set to a list without vtprune"
            )
        load = Load(self._model_config.model, loading.are_from_checkpoint(weights))
        loaded = super().load_weights(weights)  # type: ignore[misc]
        if not starting:
            self._load_notes.add(load)
        return loaded

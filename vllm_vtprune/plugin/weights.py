"""Weights that change while the engine runs, and what becomes of pruning then.

vLLM can load other weights into a running engine (``reload_weights``, and whatever else calls ``load_weights`` of a
model). The vision encoder of an API process is a copy of some of them, so the engine's workers note each load, and an
API process looks there before it prunes: one call of the operating system for each request.

Workers that Ray starts may be on other machines: they refuse to load other weights.
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


class WeightsElsewhere(GracefulHTTPError):
    """The engine has weights that no checkpoint holds, so the vision encoder of an API process cannot have them."""

    def __init__(self) -> None:
        super().__init__(
            "The weights of the engine were replaced by some that did not come from a checkpoint, which the vision "
            "encoder of the API process cannot load: no image can be pruned until reload_weights reads a checkpoint.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


class EngineWeights:
    """What an API process knows of the weights of its engine, which was started with that model."""

    def __init__(self, model: str) -> None:
        self._notes = LoadNotes(model)
        self.load = Load(model, from_checkpoint=True)

    def follow(self, runtime: PruningRuntime, *, selects: bool) -> None:
        """Forget what was made with other weights than the engine's.

        Raises:
            WeightsElsewhere: tokens are to be selected, and the engine's weights are in no checkpoint.
        """
        load = self._notes.latest()
        if load is not None:
            logger.info("The engine has loaded %s: the frontend vision tower will be loaded anew", load.model)
            self.load = load
            runtime.renew()
        if selects and not self.load.from_checkpoint:
            raise WeightsElsewhere


class NotesLoads:
    """Mixin before a stock model: notes when other weights are loaded than those that it started with."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._model_config = vllm_config.model_config  # where vLLM puts the name of another checkpoint
        self._load_notes = LoadNotes(vllm_config.model_config.model)
        self._started_by_ray = vllm_config.parallel_config.distributed_executor_backend == "ray"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load weights as the stock model does.

        Raises:
            RuntimeError: Ray started this worker, and the model has its weights already.
        """
        starting = loading.is_starting(self)
        if self._started_by_ray and not starting:
            raise RuntimeError(
                "weights cannot be replaced in an engine on Ray with vllm-vtprune, whose vision encoder in the API "
                "process would not learn of it: start the engine anew, or with VLLM_PLUGINS set to a list without "
                "vtprune"
            )
        load = Load(self._model_config.model, loading.come_from_checkpoint(weights))
        loaded = super().load_weights(weights)  # type: ignore[misc]
        if not starting:
            self._load_notes.add(load)
        return loaded

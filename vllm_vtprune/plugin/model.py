"""Make a vLLM model class accept pruned images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.in_engine import SelectsInEngine
from vllm_vtprune.plugin.items import TakesKeptEmbeddings
from vllm_vtprune.plugin.placement import refuse_placement
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.unpruned import unpruned
from vllm_vtprune.plugin.weights import RecordsLoads

Model = TypeVar("Model", bound=type)


class PrunedModel(TakesKeptEmbeddings, SelectsInEngine, RecordsLoads):
    """Mixin before a stock model: prunes images, or accepts pruned ones, which arrive as embeddings to prefill."""

    _pruning: type[PruningProcessor]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if self._pruning.prunes(vllm_config.model_config.hf_config):
            compat.refuse_unsupported(vllm_config)
            refuse_placement(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def processed_by(pruning: type[PruningProcessor]) -> Callable[[Model], Model]:
    """Decorate a `PrunedModel` with the processor that prunes its prompts, or passes them if it cannot prune."""

    def register(model: Model) -> Model:
        stock = compat.stock_factories(model)

        def build(info: Any, dummy_inputs: Any) -> Any:
            if pruning.prunes_engine(info):
                return pruning(info, dummy_inputs)
            return unpruned(stock.processor, info, dummy_inputs)

        model._pruning = pruning  # type: ignore[attr-defined]
        registered = MULTIMODAL_REGISTRY.register_processor(build, info=stock.info, dummy_inputs=stock.dummy_inputs)
        return registered(model)

    return register

"""Models that cannot be pruned: their images pass as they are, and the report says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config import ModelConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.limits import names_what_it_refuses
from vllm_vtprune.plugin.request import PRUNING_KEY, REPORT_KEY, PromptPruning, without_pruning
from vllm_vtprune.policy import FamilyDefaults
from vllm_vtprune.report import RequestReport, unpruned_media
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune.tower import TowerError, VisionTower


class UnprunedProcessor(BaseMultiModalProcessor[Any]):
    """Mixin before a stock processor: reads a prompt's ``pruning`` entry, refuses a wrong one, and prunes nothing."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self.runtime = runtime_without_tower(info.ctx.model_config)

    @names_what_it_refuses
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        if PRUNING_KEY not in inputs.hf_processor_mm_kwargs:
            return super().apply(inputs, timing_ctx)
        pruning = PromptPruning.of(inputs, from_client=self.runtime.clients_write_prompts, prompt_text=str, family=None)
        stock = replace(inputs, hf_processor_mm_kwargs=without_pruning(inputs.hf_processor_mm_kwargs))
        result = super().apply(stock, timing_ctx)
        images = unpruned_media(pruning.policies, result["mm_placeholders"], pruning.policy, "unsupported_model")
        result[REPORT_KEY] = RequestReport(images)
        return result


def unpruned(processor: Any, info: Any, dummy_inputs: Any) -> Any:
    """What a stock factory builds, of a class that also has the mixin."""
    stock = type(processor(info, dummy_inputs))
    return type(f"Unpruned{stock.__name__}", (UnprunedProcessor, stock), {})(info, dummy_inputs)


def runtime_without_tower(model_config: ModelConfig) -> PruningRuntime:
    """Where the requests of a model that cannot be pruned are counted."""

    def refuse() -> VisionTower:
        raise TowerError(f"{model_config.model} has no vision tower that can be loaded here")

    return PruningRuntime(refuse, FamilyDefaults(clip_alpha=0, provides=frozenset()), compat.model_name(model_config))

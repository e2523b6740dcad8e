"""Models that cannot be pruned: images pass unpruned, and the report gives the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config import ModelConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.limits import rejects_bad_input
from vllm_vtprune.plugin.request import PRUNING_KEY, REPORT_KEY, PromptPruning, without_pruning
from vllm_vtprune.policy import FamilyDefaults
from vllm_vtprune.report import RequestReport, unpruned_media
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune.vision_encoder import EncoderError, VisionEncoder


class UnprunedProcessor(BaseMultiModalProcessor[Any]):
    """Mixin before a stock processor: validates a prompt's ``pruning`` entry and prunes nothing."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self.runtime = runtime_without_encoder(info.ctx.model_config)

    @rejects_bad_input
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        if PRUNING_KEY not in inputs.hf_processor_mm_kwargs:
            return super().apply(inputs, timing_ctx)
        pruning = PromptPruning.of(inputs, from_client=self.runtime.clients_write_prompts, prompt_text=str, family=None)
        stock = replace(inputs, hf_processor_mm_kwargs=without_pruning(inputs.hf_processor_mm_kwargs))
        result = super().apply(stock, timing_ctx)
        images = unpruned_media(
            pruning.policies, result["mm_placeholders"], pruning.policy, "unsupported_model", pruning.details
        )
        result[REPORT_KEY] = RequestReport(images)
        return result


def unpruned(processor: Any, info: Any, dummy_inputs: Any) -> Any:
    """Build a stock factory's processor with `UnprunedProcessor` mixed in."""
    stock = type(processor(info, dummy_inputs))
    return type(f"Unpruned{stock.__name__}", (UnprunedProcessor, stock), {})(info, dummy_inputs)


def runtime_without_encoder(model_config: ModelConfig) -> PruningRuntime:
    """The runtime of a model that cannot be pruned; it only counts requests."""

    def refuse() -> VisionEncoder:
        raise EncoderError(f"{model_config.model}: the model cannot be pruned, so it has no vision encoder to load")

    return PruningRuntime(refuse, FamilyDefaults(clip_alpha=0, provides=frozenset()), compat.model_name(model_config))

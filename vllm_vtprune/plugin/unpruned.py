"""Models that cannot be pruned: their images pass as they are, and the report says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.config import ModelConfig
from vllm.multimodal.processing import BaseMultiModalProcessor, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.limits import names_what_it_refuses
from vllm_vtprune.plugin.prompt import in_prompt_order
from vllm_vtprune.plugin.request import PRUNING_KEY, REPORT_KEY, PromptPruning
from vllm_vtprune.policy import FamilyDefaults, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport
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
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        images = inputs.mm_data_items.get("image")
        pruning = PromptPruning.of(
            kwargs.pop(PRUNING_KEY),
            from_client=self.runtime.clients_write_prompts,
            num_images=0 if images is None else len(images),
            prompt_text=lambda: "",
        )
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        report = RequestReport(unpruned_images(result["mm_placeholders"], pruning.policies, pruning.policy))
        result[REPORT_KEY] = report
        return result


def unpruned(processor: Any, info: Any, dummy_inputs: Any) -> Any:
    """What a stock factory builds, of a class that also has the mixin."""
    stock = type(processor(info, dummy_inputs))
    return type(f"Unpruned{stock.__name__}", (UnprunedProcessor, stock), {})(info, dummy_inputs)


def unpruned_images(
    placeholders: Mapping[str, Sequence[Any]], policies: Sequence[PruningPolicy], policy: PruningPolicy
) -> list[ImageReport]:
    """Reports of what stands in a prompt for a model that cannot be pruned.

    Args:
        placeholders: where the media of each modality stand in the prompt.
        policies: of each image that the client sent.
        policy: of the request; of every image, where the model makes other things than images of them.
    """
    images = []
    places = placeholders.get("image", ())
    if len(places) != len(policies):
        policies = [policy] * len(places)
    for own, place in zip(policies, places, strict=True):
        count = place.get_num_embeds()
        images.append(ImageReport(own.method, count, count, bypass_reason="unsupported_model" if own.enabled else None))
    reports = in_prompt_order(images, placeholders, policy)
    return [replace(one, bypass_reason="unsupported_model") if one.bypass_reason else one for one in reports]


def runtime_without_tower(model_config: ModelConfig) -> PruningRuntime:
    """Where the requests of a model that cannot be pruned are counted."""

    def refuse() -> VisionTower:
        raise TowerError(f"{model_config.model} has no vision tower that can be loaded here")

    return PruningRuntime(refuse, FamilyDefaults(clip_alpha=0, provides=frozenset()), compat.model_name(model_config))

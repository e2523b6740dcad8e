"""The multimodal processor that prunes: a mixin over a stock vLLM processor.

vLLM sizes the placeholders of an image here, before its engine encodes it, so a budget that depends on the features
needs the features here. For an image with a policy we encode, plan, and hand the engine the kept embeddings in place of
the pixels; an image without one passes through the stock processor untouched, under its stock hash. One that is only
scaled down (`vllm_vtprune.selectors.resize`) passes through it too, under limits of its own and another hash.

| vLLM's method | what it does here |
| --- | --- |
| ``apply`` | has images encoded and plans them, which settles what each item is, and adds the report to its output |
| ``_get_mm_hashes`` | stock hash; of a pruned image with policy, nouns and kept tokens, of a scaled one with its area |
| ``_get_cache_missing_processor_kwargs`` | keeps the jobs of the images that vLLM's cache lacks, lest they shift |
| ``_apply_hf_processor_main`` | leaves out images that are planned, and scales those that are only scaled |
| ``_get_mm_prompt_updates`` | puts planned items among the others, with as many placeholders as tokens were kept |
| ``_merge_mm_kwargs`` | notices a cache that is too small for one request |

``get_dummy_mm_inputs`` is inherited: start-up profiling carries no policy and therefore measures the stock encoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune import envs
from vllm_vtprune.features import Box, Layout, VisualFeatures
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.image import BLANK, NO_OPTIONS, only_image, size_of
from vllm_vtprune.plugin.items import KEPT_EMBEDS, KEPT_PROMPT
from vllm_vtprune.plugin.jobs import PromptJobs
from vllm_vtprune.plugin.limits import names_what_it_refuses
from vllm_vtprune.plugin.placeholders import Placeholder
from vllm_vtprune.plugin.placement import EnginePlacement
from vllm_vtprune.plugin.prompt import said_in_turns, text_of
from vllm_vtprune.plugin.request import PARAM, PRUNING_KEY, REPORT_KEY, PromptPruning, without_pruning
from vllm_vtprune.plugin.selection import SELECTION, Selection
from vllm_vtprune.plugin.weights import EngineWeights
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import Placement, RequestReport, unpruned_media
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune.tower import VisionTower

if TYPE_CHECKING:
    from vllm_vtprune.plugin.vision import Facts as EncoderFacts


class CacheTooSmall(Exception):
    """Images of one request drove others of it out of vLLM's processor cache; `cache` is to be taken instead."""

    def __init__(self, cache: BaseMultiModalProcessorCache | None) -> None:
        super().__init__("vLLM's processor cache does not hold the images of one request")
        self.cache = cache


class PruningProcessor(BaseMultiModalProcessor[Any]):
    """Mixin: stands before the family's stock processor in the bases of a class.

    A family sets `family` and says how its images lie; `vllm_vtprune.plugin.items` says what a pruned image is.
    """

    family: Family
    turn: str | None = None
    """The token that begins each turn of a prompt, for chat templates of the form that `said_in_turns` reads."""

    @classmethod
    def prunes(cls, config: Any) -> bool:
        """Whether a model of the family's architectures with this config can be pruned."""
        return True

    @classmethod
    def prunes_with(cls, info: Any) -> bool:
        """Whether a model can be pruned with its engine's options of the HF processor."""
        return cls.prunes(info.get_hf_config())

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self.model_config = info.ctx.model_config
        self.engine: VllmConfig | None = None  # a server sets it; vLLM tells processors of the model alone
        if PRUNING_KEY in (info.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise ValueError(
                "mm_processor_kwargs.pruning is set for the whole engine: expected in each prompt, "
                "or as --pruning-default of `vtprune serve`"
            )
        self._weights = EngineWeights(self.model_config.model)
        self.runtime = PruningRuntime(self._load_tower, self.family, compat.model_name(self.model_config))

    @classmethod
    def family_of(cls, config: Any) -> Family:
        """The family of a model with this config."""
        return cls.family

    @cached_property
    def engine_placement(self) -> EnginePlacement:
        """Which policies the engine can follow in its encoder step; settled when first asked."""
        choice: Any = envs.placement()
        return EnginePlacement.of(choice, self.model_config, self.engine)

    def place(self, policy: PruningPolicy, *, param: str = PARAM) -> tuple[Placement, str | None]:
        """Where a policy that selects tokens does so, and why not in the engine; see `EnginePlacement.place`."""
        return self.engine_placement.place(policy, self.family, param=param)

    def _load_tower(self) -> VisionTower:
        from vllm_vtprune.plugin import vision  # builds vLLM's model, which engine processes need not import

        config = copy(self.model_config)
        if self._weights.load.model != config.model:
            config.model, config.revision = self._weights.load.model, None
        return vision.load(self.family, config, largest=self.most_tokens(), engine=self.engine)

    @property
    def encoder_facts(self) -> EncoderFacts:
        """What is known of the encoder of this API process before it is loaded.

        Raises:
            TowerError: it has no device to be on.
        """
        from vllm_vtprune.plugin import vision

        return vision.Facts.of(self.model_config, self.engine)

    # What a family says of its items

    def fields_of(self, features: VisualFeatures, kept: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Fields of a pruned image beside its embeddings: what depends on where the kept tokens were.

        Args:
            features: of the whole image.
            kept: (k,) which of its tokens are kept, on the CPU.
        """
        if features.prompt is None:
            return {}
        return {KEPT_PROMPT: torch.tensor(self.keeping(Placeholder(self.image_token_id, features.prompt), kept).ids)}

    def keeping(self, whole: Placeholder, kept: torch.Tensor) -> Placeholder:
        """What stands in the prompt for a pruned image, for families that have text between its tokens.

        Args:
            whole: what stands there unpruned.
            kept: (k,) which of the image's tokens are kept, on the CPU.
        """
        return whole.keeping(kept)

    @property
    def image_token_id(self) -> int:
        """The token that stands for an embedding of an image in a prompt."""
        return self._placeholder_of_blank.token

    @cached_property
    def _placeholder_of_blank(self) -> Placeholder:
        placeholder = self.placeholder_of(self.stock_item(BLANK), size_of(BLANK), {})
        assert placeholder is not None, "a family's image has one token for each embedding"
        return placeholder

    def stock_item(self, image: Any, hf_kwargs: Mapping[str, object] = NO_OPTIONS) -> MultiModalKwargsItem:
        """vLLM's own item of an image."""
        processed = self._apply_hf_processor_main(only_image(image), hf_kwargs)
        fields = self._get_mm_fields_config(processed, hf_kwargs)
        [item] = MultiModalKwargsItems.from_hf_inputs(processed, fields).get("image", [])
        return item

    def stock_hashes(self, inputs: ProcessorInputs) -> Mapping[str, list[str]]:
        """vLLM's own hash of each item of a prompt, by modality."""
        return super()._get_mm_hashes(inputs)

    def placeholder_of(
        self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]
    ) -> Placeholder | None:
        """What stock vLLM puts into a prompt for the image of `layout`; None where several tokens are embeddings."""
        stand_in = only_image(Image.new("1", size[::-1]))  # vLLM asks for the size alone
        items = MultiModalKwargsItems({"image": [item]})
        [[update]] = self._get_mm_prompt_updates(stand_in, hf_kwargs, items)["image"]
        return Placeholder.of(update.content)

    @abstractmethod
    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        """How the tokens of an image lie.

        Args:
            item: vLLM's fields of the image, unpruned.
            size: height and width of the image, in pixels.
            hf_kwargs: of the HF processor that made the fields.
        """

    def most_tokens(self) -> int:
        """Tokens of the largest image that the HF processor makes."""
        count: int = self.info.get_max_image_tokens()
        return count

    def view(self, height: int, width: int) -> Box:
        """The part of an image of that size, in pixels, that the model sees."""
        return 0.0, 0.0, 1.0, 1.0

    def prompt_text(self, prompt: list[int]) -> str:
        """What a prompt says, without images and speakers; where there is a `turn`, without the system's, which may be
        a standard one."""
        tokenizer = self.info.get_tokenizer()
        if self.turn is None:
            return text_of(prompt, tokenizer, self.image_token_id)
        return said_in_turns(prompt, tokenizer, self.image_token_id, turn=self.turn)

    # Hooks of vLLM

    @names_what_it_refuses
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        try:
            return self._apply(inputs, timing_ctx)
        except CacheTooSmall as full:
            return self._apply(replace(inputs, cache=full.cache), timing_ctx)

    def _apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        if PRUNING_KEY not in inputs.hf_processor_mm_kwargs:
            return super().apply(inputs, timing_ctx)

        prunes = isinstance(inputs.mm_data_items.get("image"), ImageProcessorItems)  # not embeddings by clients
        pruning = PromptPruning.of(
            inputs,
            from_client=self.runtime.clients_write_prompts,
            prompt_text=lambda: self.prompt_text(inputs.prompt),
            family=self.family if prunes else None,
        )
        stock = replace(inputs, hf_processor_mm_kwargs=without_pruning(inputs.hf_processor_mm_kwargs))
        if prunes and any(policy.enabled for policy in pruning.policies):
            here = any(policy.selects and self.place(policy)[0] == "api" for policy in pruning.policies)
            self._weights.follow(self.runtime, selects=here)
            jobs = PromptJobs.settle(self, stock, pruning)
            result = super().apply(jobs.in_inputs(), timing_ctx)
            result[REPORT_KEY] = jobs.finish(result["mm_placeholders"])
        else:
            result = super().apply(stock, timing_ctx)
            images = unpruned_media(pruning.policies, result["mm_placeholders"], pruning.policy)
            result[REPORT_KEY] = RequestReport(images, untuned=not self.family.tuned)
        return result

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        jobs = _jobs_in(inputs.hf_processor_mm_kwargs)
        return self.stock_hashes(inputs) if jobs is None else jobs.hashes

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        jobs = _jobs_in(kwargs)
        return kwargs if jobs is None else {**kwargs, PRUNING_KEY: jobs.missing(mm_is_cached["image"])}

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        jobs = _jobs_in(hf_kwargs)
        if jobs is None:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        hf_kwargs = without_pruning(hf_kwargs)
        processed = super()._apply_hf_processor_main(_select_images(mm_items, jobs.as_they_are()), hf_kwargs)
        jobs.scale(hf_kwargs)
        return processed

    def _merge_mm_kwargs(self, cache: BaseMultiModalProcessorCache, mm_hashes: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._merge_mm_kwargs(cache, mm_hashes, *args, **kwargs)
        except AssertionError as error:
            raise CacheTooSmall(compat.without_items(cache, mm_hashes)) from error

    def _get_mm_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        jobs = _jobs_in(hf_processor_mm_kwargs)
        if jobs is None:
            return super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        items = jobs.items(out_mm_kwargs.get("image", []))
        whole = [index for index, item in enumerate(items) if item.keys().isdisjoint((KEPT_EMBEDS, SELECTION))]
        out_mm_kwargs["image"] = [items[index] for index in whole]
        updates = self._get_prompt_updates(
            mm_items=_select_images(mm_items, whole),
            hf_processor_mm_kwargs=without_pruning(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )

        def content(stock: Callable[[int], Any], index: int) -> Any:
            if index in whole:
                return stock(whole.index(index))
            return self._pruned_placeholder(items[index]).content()

        updates = [
            replace(update, replacement=partial(content, update.replacement)) if update.modality == "image" else update
            for update in updates
        ]
        bound = self._bind_and_group_updates(updates, mm_items.get_all_counts())
        out_mm_kwargs["image"] = items
        return bound

    def _pruned_placeholder(self, item: MultiModalKwargsItem) -> Placeholder:
        """What stands in the prompt for a pruned image."""
        if KEPT_PROMPT in item:
            return Placeholder(self.image_token_id, tuple(item[KEPT_PROMPT].data.tolist()))
        if SELECTION in item:
            return self._placeholder_of_blank.resized(Selection.read(item[SELECTION].data).keep)
        return self._placeholder_of_blank.resized(len(item[KEPT_EMBEDS].data))


def _jobs_in(hf_kwargs: Mapping[str, object]) -> PromptJobs | None:
    jobs = hf_kwargs.get(PRUNING_KEY)
    return jobs if isinstance(jobs, PromptJobs) else None


def _select_images(mm_items: MultiModalDataItems, indices: Sequence[int]) -> MultiModalDataItems:
    images = mm_items.get("image")
    if images is None:
        return mm_items
    return MultiModalDataItems({**mm_items, "image": ImageProcessorItems([images.data[i] for i in indices])})

"""The multimodal processor that prunes: a mixin before a stock vLLM processor.

vLLM sets an image's placeholder length here, before the engine encodes the image. An adaptive budget needs the features
at this point. So the processor encodes and plans each image with a policy, and passes the kept embeddings to the engine
instead of pixels. Images without a policy take the stock path under their stock hash. Images of the method `resize`
(`vllm_vtprune.selectors.resize`) take the stock path with their own size limits and hash.

| vLLM's method | override |
| --- | --- |
| ``apply`` | encodes and plans the images, and adds the report to the output |
| ``_get_mm_hashes`` | hash with policy, nouns and kept tokens for pruned images, with the area for resized ones |
| ``_get_cache_missing_processor_kwargs`` | keeps only the jobs of images missing in vLLM's processor cache |
| ``_apply_hf_processor_main`` | skips planned images, resizes those of `resize` |
| ``_get_mm_prompt_updates`` | inserts planned items, with placeholders of the kept length |
| ``_merge_mm_kwargs`` | detects a processor cache too small for one request |

``get_dummy_mm_inputs`` is inherited: start-up profiling has no policy and so measures the stock encoder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

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
from vllm_vtprune.devices import EncoderPlace
from vllm_vtprune.encoder import PlannedImage
from vllm_vtprune.features import Box, Layout
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.gpu import place_of
from vllm_vtprune.plugin.image import BLANK, NO_OPTIONS, ImageJob, only_image, size_of
from vllm_vtprune.plugin.items import KEPT_EMBEDS, KEPT_PROMPT
from vllm_vtprune.plugin.jobs import PromptJobs
from vllm_vtprune.plugin.limits import rejects_bad_input
from vllm_vtprune.plugin.placeholders import Placeholder
from vllm_vtprune.plugin.placement import EnginePlacement
from vllm_vtprune.plugin.prompt import text_of, text_without_system
from vllm_vtprune.plugin.request import PARAM, PRUNING_KEY, REPORT_KEY, PromptPruning, without_pruning
from vllm_vtprune.plugin.selection import SELECTION, Selection
from vllm_vtprune.plugin.weights import EngineWeights
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import Placement, RequestReport, unpruned_media
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune.vision_encoder import VisionEncoder


class CacheTooSmall(Exception):
    """Images of a request evicted each other from vLLM's processor cache; retry the request with `cache`."""

    def __init__(self, cache: BaseMultiModalProcessorCache | None) -> None:
        super().__init__("vLLM's processor cache is too small for the images of one request")
        self.cache = cache


class PruningProcessor(BaseMultiModalProcessor[Any]):
    """Mixin before the family's stock processor.

    A family sets `family` and defines `layout`; `vllm_vtprune.plugin.items` defines the item of a pruned image.
    """

    family: Family
    turn: str | None = None
    """Token that begins each turn, for chat templates that `text_without_system` reads; None for others."""

    @classmethod
    def prunes(cls, config: Any) -> bool:
        """Whether a model with this HF config can be pruned."""
        return True

    @classmethod
    def prunes_engine(cls, info: Any) -> bool:
        """Whether the model can be pruned under the engine's HF processor options."""
        return cls.prunes(info.get_hf_config())

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self.model_config = info.ctx.model_config
        self.engine: VllmConfig | None = None  # None in `vllm.LLM`
        self.engine_placement = self._engine_placement()
        self.encoder_place: EncoderPlace | None = None  # set in an encoder process, which has no engine
        if PRUNING_KEY in (info.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise ValueError(
                "mm_processor_kwargs.pruning: set for the whole engine; expected in each prompt, "
                "or as --pruning-default of `vtprune serve`"
            )
        self.weights = EngineWeights(self.model_config.model)
        self.runtime = PruningRuntime(self._load_encoder, self.family, compat.model_name(self.model_config))

    @classmethod
    def family_of(cls, config: Any) -> Family:
        """The family of a model with this config."""
        return cls.family

    def use_engine(self, engine: VllmConfig) -> None:
        """Take the facts of a server's engine; vLLM passes processors only the model's config."""
        self.engine = engine
        self.engine_placement = self._engine_placement()

    def _engine_placement(self) -> EnginePlacement:
        """Which policies the engine can follow in its encoder step."""
        choice: Any = envs.placement()
        return EnginePlacement.of(choice, self.model_config, self.engine)

    def place(
        self, policy: PruningPolicy, *, return_kept: bool = False, param: str = PARAM
    ) -> tuple[Placement, str | None]:
        """Where a policy that selects tokens does so, and why not in the engine; see `EnginePlacement.place`."""
        return self.engine_placement.place(policy, self.family, return_kept=return_kept, param=param)

    def selects_here(self, image: ImageJob) -> bool:
        """Whether this process selects the tokens of an image whose policy selects tokens."""
        return image.sent_plan is None and self.place(image.policy, return_kept=image.return_kept)[0] == "api"

    def _load_encoder(self) -> VisionEncoder:
        from vllm_vtprune.plugin import vision  # not needed in engine processes

        config = copy(self.model_config)
        if self.weights.load.model != config.model:
            config.model, config.revision = self.weights.load.model, None
        place = self.encoder_place or place_of(self.engine)
        return vision.load(self.family, config, largest=self.max_image_tokens(), place=place)

    # Overridden by families

    def position_fields(self, image: PlannedImage | Layout, kept: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Fields of a pruned image that depend on which tokens are kept, besides its embeddings.

        Args:
            image: the image, unpruned.
            kept: (k,) int64 indices of the kept tokens, on the CPU.
        """
        if image.prompt is None:
            return {}
        placeholder = self.prune_placeholder(Placeholder(self.image_token_id, image.prompt), kept)
        return {KEPT_PROMPT: torch.tensor(placeholder.ids)}

    def without_padding(self, item: MultiModalKwargsItem, layout: Layout) -> MultiModalKwargsItem:
        """An image's stock item without what makes it as large as others of its prompt."""
        return item

    def prune_placeholder(self, placeholder: Placeholder, kept: torch.Tensor) -> Placeholder:
        """The placeholder of a pruned image, for families with text between visual tokens.

        Args:
            placeholder: the unpruned placeholder.
            kept: (k,) int64 indices of the kept tokens, on the CPU.
        """
        return placeholder.prune(kept)

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for a visual token in a prompt."""
        return self._placeholder_of_blank.token

    @cached_property
    def _placeholder_of_blank(self) -> Placeholder:
        placeholder = self.placeholder_of(self.stock_item(BLANK), size_of(BLANK), {})
        assert placeholder is not None, "a family's image has one token for each embedding"
        return placeholder

    def stock_item(self, image: Any, hf_kwargs: Mapping[str, object] = NO_OPTIONS) -> MultiModalKwargsItem:
        """vLLM's item of an unpruned image."""
        processed = self._apply_hf_processor_main(only_image(image), hf_kwargs)
        fields = self._get_mm_fields_config(processed, hf_kwargs)
        [item] = MultiModalKwargsItems.from_hf_inputs(processed, fields).get("image", [])
        return item

    def stock_hashes(self, inputs: ProcessorInputs) -> Mapping[str, list[str]]:
        """vLLM's hash of each item of an unpruned prompt, by modality."""
        return super()._get_mm_hashes(inputs)

    def placeholder_of(
        self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]
    ) -> Placeholder | None:
        """vLLM's placeholder of an unpruned image; arguments as for `layout`.

        None unless exactly one token id stands for embeddings.
        """
        stand_in = only_image(Image.new("1", size[::-1]))  # vLLM reads only the size
        items = MultiModalKwargsItems({"image": [item]})
        [[update]] = self._get_mm_prompt_updates(stand_in, hf_kwargs, items)["image"]
        return Placeholder.of(update.content)

    @abstractmethod
    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        """The layout of an image's visual tokens.

        Args:
            item: vLLM's item of the unpruned image.
            size: height and width in pixels.
            hf_kwargs: HF processor options with which the item was made.
        """

    def max_image_tokens(self) -> int:
        """Visual tokens of the largest image that the HF processor makes."""
        count: int = self.info.get_max_image_tokens()
        return count

    def view(self, height: int, width: int) -> Box:
        """The part of an image of that size, in pixels, that reaches the encoder."""
        return 0.0, 0.0, 1.0, 1.0

    def prompt_text(self, prompt: list[int]) -> str:
        """The text of a prompt without images and role names; with `turn`, without the system message, which may be
        the chat template's default."""
        tokenizer = self.info.get_tokenizer()
        if self.turn is None:
            return text_of(prompt, tokenizer, self.image_token_id)
        return text_without_system(prompt, tokenizer, self.image_token_id, turn=self.turn)

    # vLLM's hooks

    @rejects_bad_input
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        try:
            return self._apply(inputs, timing_ctx)
        except CacheTooSmall as error:
            return self._apply(replace(inputs, cache=error.cache), timing_ctx)

    def _apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        if PRUNING_KEY not in inputs.hf_processor_mm_kwargs:
            return super().apply(inputs, timing_ctx)

        has_images = isinstance(inputs.mm_data_items.get("image"), ImageProcessorItems)  # not clients' embeddings
        pruning = PromptPruning.of(
            inputs,
            from_client=self.runtime.clients_write_prompts,
            prompt_text=lambda: self.prompt_text(inputs.prompt),
            family=self.family if has_images else None,
        )
        stock = replace(inputs, hf_processor_mm_kwargs=without_pruning(inputs.hf_processor_mm_kwargs))
        if has_images and any(policy.enabled for policy in pruning.policies):
            selects_here = any(image.policy.selects and self.selects_here(image) for image in pruning.images)
            self.weights.follow(self.runtime, selects=selects_here)
            jobs = PromptJobs.prepare(self, stock, pruning)
            result = super().apply(jobs.inputs_with_jobs(), timing_ctx)
            result[REPORT_KEY] = jobs.finish(result["mm_placeholders"])
        else:
            result = super().apply(stock, timing_ctx)
            images = unpruned_media(
                pruning.policies, result["mm_placeholders"], pruning.policy, details=pruning.details
            )
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
        return kwargs if jobs is None else {**kwargs, PRUNING_KEY: jobs.uncached(mm_is_cached["image"])}

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        jobs = _jobs_in(hf_kwargs)
        if jobs is None:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        hf_kwargs = without_pruning(hf_kwargs)
        processed = super()._apply_hf_processor_main(_select_images(mm_items, jobs.stock_indices()), hf_kwargs)
        jobs.resize(hf_kwargs)
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
        unpruned = [index for index, item in enumerate(items) if item.keys().isdisjoint((KEPT_EMBEDS, SELECTION))]
        out_mm_kwargs["image"] = [items[index] for index in unpruned]
        updates = self._get_prompt_updates(
            mm_items=_select_images(mm_items, unpruned),
            hf_processor_mm_kwargs=without_pruning(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )

        def content(stock: Callable[[int], Any], index: int) -> Any:
            if index in unpruned:
                return stock(unpruned.index(index))
            return self._pruned_placeholder(items[index]).content()

        updates = [
            replace(update, replacement=partial(content, update.replacement)) if update.modality == "image" else update
            for update in updates
        ]
        bound = self._bind_and_group_updates(updates, mm_items.get_all_counts())
        out_mm_kwargs["image"] = items
        return bound

    def _pruned_placeholder(self, item: MultiModalKwargsItem) -> Placeholder:
        """The placeholder of a pruned image."""
        if KEPT_PROMPT in item:
            return Placeholder(self.image_token_id, tuple(item[KEPT_PROMPT].data.tolist()))
        if SELECTION in item:
            return self._placeholder_of_blank.resized(Selection.read(item[SELECTION].data).length)
        return self._placeholder_of_blank.resized(len(item[KEPT_EMBEDS].data))


def _jobs_in(hf_kwargs: Mapping[str, object]) -> PromptJobs | None:
    jobs = hf_kwargs.get(PRUNING_KEY)
    return jobs if isinstance(jobs, PromptJobs) else None


def _select_images(mm_items: MultiModalDataItems, indices: Sequence[int]) -> MultiModalDataItems:
    images = mm_items.get("image")
    if images is None:
        return mm_items
    return MultiModalDataItems({**mm_items, "image": ImageProcessorItems([images.data[i] for i in indices])})

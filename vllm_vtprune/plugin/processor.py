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

The hash of a pruned item tells which tokens were kept. Features differ in their last bits between batches of the
encoder, and so, now and then, does what is kept of them: the same image under the same policy is another item then, and
none of vLLM's caches confuses the two.

``get_dummy_mm_inputs`` is inherited: start-up profiling carries no policy and therefore measures the stock encoder.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune import text
from vllm_vtprune.budget import fixed_count
from vllm_vtprune.encoder import Encoded
from vllm_vtprune.features import Box, Layout, PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.items import KEPT_PROMPT, kept_count, pruned_item
from vllm_vtprune.plugin.limits import names_what_it_refuses
from vllm_vtprune.plugin.loads import Load, LoadNotes
from vllm_vtprune.plugin.placeholders import Placeholder
from vllm_vtprune.plugin.prompt import in_prompt_order, noun_ids, text_of, token_counts
from vllm_vtprune.plugin.request import PRUNING_KEY, REPORT_KEY, PromptPruning
from vllm_vtprune.plugin.weights import WeightsElsewhere
from vllm_vtprune.policy import PolicyError, PruningPolicy, RatioBudget, TokensBudget
from vllm_vtprune.report import BypassReason, ImageReport, RequestReport, StageRun
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune.selectors.resize import largest_area
from vllm_vtprune.sequence import sequence, sequence_length
from vllm_vtprune.tower import VisionTower

if TYPE_CHECKING:
    from vllm_vtprune.plugin.vision import Facts as EncoderFacts

logger = init_logger("vllm.vtprune")

BLANK = 64
"""Pixels of the side of the image that is encoded at the start."""

IDENTITY = "vtprune-4"
"""Part of the hash of every pruned item; to be changed when the same policy comes to keep other tokens than before."""


class CacheTooSmall(Exception):
    """Images of one request drove others of it out of vLLM's processor cache.

    Attributes:
        cache: what to process the request with instead.
    """

    def __init__(self, cache: BaseMultiModalProcessorCache | None) -> None:
        super().__init__("vLLM's processor cache does not hold the images of one request")
        self.cache = cache


@dataclass
class EncodingMedia(MediaWithBytes[Image.Image]):
    """A decoded image whose features are on their way, from a tower of that generation."""

    encoding: Future[Encoded] | None = None
    generation: int = 0


@dataclass
class ImageJob:
    """What is to be done with one image of a prompt and, afterwards, what was done."""

    policy: PruningPolicy  # the family's defaults filled in
    feature_key: str
    item_hash: str
    nouns: tuple[str, ...] = ()
    noun_ids: tuple[int, ...] = ()
    text_fallback: text.TextFallback | None = None
    question: str = ""  # hash of image, policy and text
    encoding: Future[Encoded] | None = None
    item: MultiModalKwargsItem | None = None  # of an image that was planned or scaled
    whole_tokens: int = 0  # of an image that may be scaled
    area: int | None = None  # in pixels, to which the image is scaled; None where it is not
    processed: bool = False
    report: ImageReport | None = None


@dataclass(frozen=True)
class PromptJobs:
    """Travels through vLLM's hooks in place of the client's value: nothing is kept on the processor itself."""

    images: list[ImageJob]
    hashes: Mapping[str, list[str]]  # of every item of the prompt, by modality
    report: RequestReport


class PruningProcessor(BaseMultiModalProcessor[Any]):
    """Mixin: stands before the family's stock processor in the bases of a class.

    A family sets `family` and says how its images lie; `vllm_vtprune.plugin.items` says what a pruned image is.
    """

    family: Family

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
        self._model_config = info.ctx.model_config
        self.engine: VllmConfig | None = None  # a server sets it; vLLM tells processors of the model alone
        if PRUNING_KEY in (info.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise ValueError(
                "mm_processor_kwargs.pruning is set for the whole engine: expected in each prompt, "
                "or as --pruning-default of `vtprune serve`"
            )
        self._load_notes = LoadNotes(self._model_config.model)
        self._loaded = Load(self._model_config.model, from_checkpoint=True)
        self.runtime = PruningRuntime(self._load_tower, self.family, compat.model_name(self._model_config))

    def _load_tower(self) -> VisionTower:
        from vllm_vtprune.plugin import vision  # builds vLLM's model, which engine processes need not import

        config = copy(self._model_config)
        if self._loaded.model != config.model:
            config.model, config.revision = self._loaded.model, None
        return vision.load(self.family, config, largest=self.most_tokens(), engine=self.engine)

    @property
    def encoder_facts(self) -> EncoderFacts:
        """What is known of the encoder of this API process before it is loaded.

        Raises:
            TowerError: it has no device to be on.
        """
        from vllm_vtprune.plugin import vision

        return vision.Facts.of(self._model_config, self.engine)

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
        blank = Image.new("RGB", (BLANK, BLANK))
        placeholder = self.placeholder_of(self.stock_item(blank), (BLANK, BLANK), {})
        assert placeholder is not None, "a family's image has one token for each embedding"
        return placeholder

    def stock_item(self, image: Image.Image) -> MultiModalKwargsItem:
        """vLLM's own item of an image, RGB."""
        [item] = self._image_items(self._apply_hf_processor_main(_only_image(image), {}), {})
        return item

    def placeholder_of(
        self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]
    ) -> Placeholder | None:
        """What stock vLLM puts into a prompt for an image; None where several tokens stand for embeddings.

        Args:
            item, size, hf_kwargs: as for `layout`.
        """
        stand_in = _only_image(Image.new("1", size[::-1]))  # vLLM asks for the size alone
        items = MultiModalKwargsItems({"image": [item]})
        [[update]] = self._get_mm_prompt_updates(stand_in, hf_kwargs, items)["image"]
        return Placeholder.of(update.content)

    def layout(self, item: MultiModalKwargsItem, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> Layout:
        """How the tokens of an image lie.

        Args:
            item: vLLM's fields of the image, unpruned.
            size: height and width of the image, in pixels.
            hf_kwargs: of the HF processor that made the fields.
        """
        raise NotImplementedError

    def most_tokens(self) -> int:
        """Tokens of the largest image that the HF processor makes."""
        count: int = self.info.get_max_image_tokens()
        return count

    def view(self, height: int, width: int) -> Box:
        """The part of an image of that size, in pixels, that the model sees."""
        return 0.0, 0.0, 1.0, 1.0

    # What a family with dynamic resolution says of its images

    def num_tokens(self, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> int:
        """How many tokens an image has that is not pruned; never fewer for a larger `at_area`, and 1 for area 1.

        Args:
            size: height and width of the image, in pixels.
            hf_kwargs: of the HF processor that scales it.
        """
        raise NotImplementedError

    def at_area(self, hf_kwargs: Mapping[str, object], area: int) -> Mapping[str, object]:
        """The same options of the HF processor, but that it scales images to about ``area`` pixels."""
        raise NotImplementedError

    # For images outside of any request

    def warm_up(self) -> None:
        """Load the tower and what else the first request would wait for; see `PruningRuntime.warm_up`."""
        self.runtime.warm_up(self.preprocess(MediaWithBytes(Image.new("RGB", (BLANK, BLANK)), b""), {}))

    def encode_alone(self, media: MediaWithBytes[Image.Image]) -> VisualFeatures:
        """What the vision encoder makes of one image."""
        key = self.feature_key(media, None, {}, {})
        return self.runtime.encoder.submit(key, self.preprocess(media, {})).result().features

    def plan_alone(
        self, media: MediaWithBytes[Image.Image], policy: PruningPolicy, query: str
    ) -> tuple[ImageReport, PruningPlan, VisualFeatures]:
        """Choose the tokens of one image, with a policy that prunes.

        Returns:
            What a request would be told of it, the plan, and what it was made from.

        Raises:
            PolicyError: the family lacks what the policy asks for.
        """
        job = ImageJob(policy.resolve(self.family), feature_key="", item_hash="")
        report = RequestReport()
        if job.policy.conditions_on_text:
            self._read_text(job, query, report)
        features = self.encode_alone(media)
        plan, _ = self._plan(job, features, report)
        assert job.report is not None
        return job.report, plan, features

    # For images that are encoded before their request is processed

    def feature_key(
        self,
        media: MediaWithBytes[Image.Image],
        uuid: str | None,
        hf_kwargs: Mapping[str, object],
        media_io_kwargs: Mapping[str, Mapping[str, Any]],
    ) -> str:
        """The key under which `apply` will look for the features of an image."""
        inputs = ProcessorInputs(
            [],
            _only_image(media),
            {"image": [uuid]},
            hf_processor_mm_kwargs=hf_kwargs,
            media_io_kwargs=media_io_kwargs,
        )
        key: str = self._get_mm_hashes(inputs)["image"][0]
        return key

    def preprocess(self, media: MediaWithBytes[Image.Image], hf_kwargs: Mapping[str, object]) -> PreparedImage:
        """An image as `apply` would have it encoded. May be called from any thread."""
        items = _only_image(media)
        [image] = self._image_items(self._apply_hf_processor_main(items, hf_kwargs), hf_kwargs)
        return PreparedImage(image, self.layout(image, _size(items, 0), hf_kwargs))

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

        stock = replace(inputs, hf_processor_mm_kwargs=_without_key(inputs.hf_processor_mm_kwargs))
        images = inputs.mm_data_items.get("image")
        pruning = PromptPruning.of(
            inputs.hf_processor_mm_kwargs[PRUNING_KEY],
            from_client=self.runtime.clients_write_prompts,
            num_images=0 if images is None else len(images),
            prompt_text=lambda: self._prompt_text(inputs.prompt),
        )
        report = RequestReport(untuned=not self.family.tuned)
        if isinstance(images, ImageProcessorItems) and any(policy.enabled for policy in pruning.policies):
            self._follow_engine(pruning)
            jobs = self._jobs(stock, images, pruning, report)
            result = super().apply(self._with_jobs(stock, images, jobs), timing_ctx)
            self._report_jobs(jobs, result)
        else:
            result = super().apply(stock, timing_ctx)
            for policy, count in zip(pruning.policies, token_counts(result), strict=True):
                reason: BypassReason | None = "unsupported_modality" if policy.enabled else None
                report.images.append(ImageReport(policy.method, count, count, bypass_reason=reason))
        report.images = in_prompt_order(report.images, result["mm_placeholders"], pruning.policy)
        self.runtime.count_stages(report)
        result[REPORT_KEY] = report
        return result

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        jobs = _jobs_in(inputs.hf_processor_mm_kwargs)
        return super()._get_mm_hashes(inputs) if jobs is None else jobs.hashes

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        jobs = _jobs_in(kwargs)
        if jobs is None:
            return kwargs
        missing = [job for job, is_cached in zip(jobs.images, mm_is_cached["image"], strict=True) if not is_cached]
        return {**kwargs, PRUNING_KEY: replace(jobs, images=missing)}

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        jobs = _jobs_in(hf_kwargs)
        if jobs is None:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)

        for job in jobs.images:
            job.processed = True
        in_pixels = [index for index, job in enumerate(jobs.images) if job.item is None]
        for index in in_pixels:
            if mm_items["image"].get(index) is None:  # named by its uuid, and what was known of it is gone
                raise _no_data(jobs.images[index])
        stock_kwargs = _without_key(hf_kwargs)
        whole = [index for index in in_pixels if jobs.images[index].area is None]
        processed = super()._apply_hf_processor_main(_select_images(mm_items, whole), stock_kwargs)
        for index in in_pixels:
            area = jobs.images[index].area
            if area is not None:
                jobs.images[index].item = self._scaled(mm_items, index, self.at_area(stock_kwargs, area))
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
        processed = iter(out_mm_kwargs.get("image", []))
        items = [next(processed) if job.item is None else job.item for job in jobs.images]
        in_pixels = [index for index, item in enumerate(items) if kept_count(item) is None]
        out_mm_kwargs["image"] = [items[index] for index in in_pixels]
        updates = self._get_prompt_updates(
            mm_items=_select_images(mm_items, in_pixels),
            hf_processor_mm_kwargs=_without_key(hf_processor_mm_kwargs),
            out_mm_kwargs=out_mm_kwargs,
        )

        def with_pruned(update: Any) -> Any:
            def replacement(index: int) -> Any:
                item = items[index]
                kept = kept_count(item)
                return update.replacement(in_pixels.index(index)) if kept is None else self._content_of(item, kept)

            return replace(update, replacement=replacement)

        updates = [with_pruned(update) if update.modality == "image" else update for update in updates]
        bound = self._bind_and_group_updates(updates, mm_items.get_all_counts())
        out_mm_kwargs["image"] = items
        return bound

    # Steps of the above

    def _content_of(self, item: MultiModalKwargsItem, num_embeds: int) -> Any:
        """What stands in the prompt for a pruned image, as in vLLM's prompt updates."""
        if KEPT_PROMPT in item:
            return Placeholder(self.image_token_id, tuple(item[KEPT_PROMPT].data.tolist())).content()
        return self._placeholder_of_blank.resized(num_embeds).content()

    def _image_items(self, processed: BatchFeature, hf_kwargs: Mapping[str, object]) -> list[MultiModalKwargsItem]:
        """Each image of the output of the HF processor."""
        fields = self._get_mm_fields_config(processed, hf_kwargs)
        return list(MultiModalKwargsItems.from_hf_inputs(processed, fields).get("image", []))

    def _prompt_text(self, prompt: list[int]) -> str:
        return text_of(prompt, self.info.get_tokenizer(), self.image_token_id)

    def _follow_engine(self, pruning: PromptPruning) -> None:
        """Forget what was made with other weights than the engine's.

        Raises:
            WeightsElsewhere: tokens are to be selected, and the engine's weights are in no checkpoint.
        """
        load = self._load_notes.latest()
        if load is not None:
            logger.info("The engine has loaded %s: the frontend vision tower will be loaded anew", load.model)
            self._loaded = load
            self.runtime.renew()
        if not self._loaded.from_checkpoint and any(policy.selects for policy in pruning.policies):
            raise WeightsElsewhere

    def _jobs(
        self, stock: ProcessorInputs, images: ImageProcessorItems, pruning: PromptPruning, report: RequestReport
    ) -> PromptJobs:
        """Settle what is done with each image, and the item that it becomes.

        Raises:
            ValueError: an image is named by its uuid, and what is needed of it is not known any more.
            CancelledError: the request was given up meanwhile.
            Exception: what encoding an image raised.
        """
        hashes = dict(self._get_mm_hashes(stock))
        identified = compat.without_synthetic_uuids(stock)
        feature_keys = hashes["image"] if identified is stock else self._get_mm_hashes(identified)["image"]
        jobs = [
            ImageJob(policy.resolve(self.family) if policy.enabled else policy, feature_keys[i], hashes["image"][i])
            for i, policy in enumerate(pruning.policies)
        ]
        hf_kwargs, cache = stock.hf_processor_mm_kwargs, compat.cache_in_use(stock)
        try:
            for index, job in enumerate(jobs):
                if job.policy.selects:
                    if job.policy.conditions_on_text:
                        self._read_text(job, pruning.texts[index], report)
                    if not self._is_cached(job, cache):
                        job.encoding = self._encoding(job, images.data[index], hf_kwargs)
                elif job.policy.enabled:
                    self._choose_area(job, self._size_of(job, images, index), hf_kwargs)
            for job, features in self._encoded(jobs, report):
                self._make_item(job, features, report)
        except BaseException:
            for job in jobs:
                if job.encoding is not None:
                    job.encoding.cancel()
            raise
        return PromptJobs(jobs, hashes | {"image": [job.item_hash for job in jobs]}, report)

    def _is_cached(self, job: ImageJob, cache: BaseMultiModalProcessorCache | None) -> bool:
        """Whether vLLM's cache holds what the job asks for; then the job is given its hash and report."""
        policy = job.policy.selection_digest()
        job.question = _hash_of(self.runtime.generation, job.item_hash, policy, job.noun_ids)
        known = self.runtime.planned.get(job.question)
        if known is None or cache is None or not cache.is_cached([known.item_hash])[0]:
            return False
        job.item_hash = known.item_hash
        job.report = replace(known.report, nouns=job.nouns, text_fallback=job.text_fallback)
        return True

    def _encoding(self, job: ImageJob, data: Any, hf_kwargs: Mapping[str, object]) -> Future[Encoded]:
        """The features of an image, which are encoded unless they are at hand or on their way."""
        encoder = self.runtime.encoder
        if isinstance(data, EncodingMedia) and data.encoding and data.generation == self.runtime.generation:
            return data.encoding
        found = encoder.find(job.feature_key)
        if found is not None:
            return found
        if data is None:
            raise _no_data(job)
        return encoder.submit(job.feature_key, self.preprocess(data, hf_kwargs))

    def _encoded(self, jobs: Sequence[ImageJob], report: RequestReport) -> list[tuple[ImageJob, VisualFeatures]]:
        """Wait for the features of every image that is to be planned."""
        encoded = [(job, job.encoding.result()) for job in jobs if job.encoding is not None]
        self.runtime.count_hits(one for _, one in encoded)
        forwards = {one.forward for _, one in encoded if one.forward is not None}
        report.stages += [StageRun("encode", forward.began, forward.seconds) for forward in forwards]
        return [(job, one.features) for job, one in encoded]

    def _make_item(self, job: ImageJob, features: VisualFeatures, report: RequestReport) -> None:
        """Plan an image, and note for later requests what became of it."""
        plan, embeds = self._plan(job, features, report)
        assert job.report is not None
        kept = plan.kept.cpu()
        job.item = pruned_item(embeds.cpu(), self.fields_of(features, kept))
        job.item_hash = _hash_of(job.question, hashlib.sha256(kept.numpy().tobytes()).hexdigest())
        self.runtime.record_plan(job.question, job.item_hash, job.report)

    def _size_of(self, job: ImageJob, images: ImageProcessorItems, index: int) -> tuple[int, int]:
        """Height and width of an image, in pixels; as it was before, where the client only names it.

        Raises:
            ValueError: it is named by its uuid, and its size is not known any more.
        """
        sizes = self.runtime.image_sizes
        if images.data[index] is not None:
            sizes.put(job.feature_key, _size_in(images, index))
        size = sizes.get(job.feature_key)
        if size is None:
            raise _no_data(job)
        return size

    def _choose_area(self, job: ImageJob, size: tuple[int, int], hf_kwargs: Mapping[str, object]) -> None:
        """Have an image scaled, unless it has no more tokens than the budget as it is: then it stays the stock item."""
        assert isinstance(job.policy.budget, RatioBudget | TokensBudget)
        job.whole_tokens = self.num_tokens(size, hf_kwargs)
        k = fixed_count(job.policy.budget, job.whole_tokens)
        if k < job.whole_tokens:
            job.area = largest_area(lambda area: self.num_tokens(size, self.at_area(hf_kwargs, area)), k)
            job.item_hash = _hash_of(self.runtime.generation, job.item_hash, job.policy.method, job.area)

    def _scaled(
        self, mm_items: MultiModalDataItems, index: int, hf_kwargs: Mapping[str, object]
    ) -> MultiModalKwargsItem:
        """The item of one image of a prompt, which may be scaled otherwise than the others."""
        image = _only_image(mm_items["image"].get(index))
        [item] = self._image_items(super()._apply_hf_processor_main(image, hf_kwargs), hf_kwargs)
        return item

    def _read_text(self, job: ImageJob, prompt: str, report: RequestReport) -> None:
        started = time.perf_counter()
        options = job.policy.text
        job.nouns, job.text_fallback = text.read_prompt(prompt, options.clean, options.modifiers)
        job.noun_ids = tuple(token for noun in job.nouns for token in noun_ids(noun, self.info.get_tokenizer()))
        report.text_pipeline = text.text_pipeline_name()
        report.add_timings({"text": time.perf_counter() - started})

    def _with_jobs(self, stock: ProcessorInputs, images: ImageProcessorItems, jobs: PromptJobs) -> ProcessorInputs:
        """The inputs that carry the jobs.

        An image that the client named by its uuid, without data, gets a stand-in if its item is at hand; else it stays
        missing and vLLM answers that its data is not there.
        """
        data = [
            Image.new("RGB", (1, 1)) if image is None and job.item is not None else image
            for image, job in zip(images.data, jobs.images, strict=True)
        ]
        return replace(
            stock,
            mm_data_items=MultiModalDataItems({**stock.mm_data_items, "image": ImageProcessorItems(data)}),
            hf_processor_mm_kwargs={**stock.hf_processor_mm_kwargs, PRUNING_KEY: jobs},
        )

    def _plan(self, job: ImageJob, features: VisualFeatures, report: RequestReport) -> tuple[PruningPlan, torch.Tensor]:
        """The plan of one image, and (T, d) what is to be prefilled. Puts the image's report into the job."""
        plan = self.runtime.plan(features, job.policy, job.noun_ids, job.feature_key)
        self._refuse_other_mask(job.policy, features.num_tokens, len(plan.kept))
        report.add_timings(plan.timings)
        embeds = sequence(features, plan).to(self._model_config.dtype)
        job.report = _image_report(job, plan, sequence_length(features), len(embeds))
        return plan, embeds

    def _refuse_other_mask(self, policy: PruningPolicy, tokens: int, kept: int) -> None:
        """Refuse a budget with which an image's tokens would attend to each other otherwise than unpruned.

        Where they attend in both directions, layers with a sliding window treat an image that does not fit into the
        window otherwise than one that does: vLLM 0.32.0 bounds it in the kernel, or makes it causal
        (v1/worker/gpu/attn_utils.py, ``compute_mm_prefix_ranges``).
        """
        window = self._model_config.get_sliding_window() if self._model_config.is_mm_prefix_lm else None
        if window is not None and kept <= window < tokens:
            raise PolicyError(
                "pruning.budget",
                policy.budget,
                f"one that keeps more than {window}, or an image of no more tokens than that",
                f"{kept} of the {tokens} tokens of an image fit into the sliding window of {window}, in which they "
                "would attend to each other in both directions, as those of the whole image do not",
            )

    def _report_jobs(self, jobs: PromptJobs, result: Any) -> None:
        for job, count in zip(jobs.images, token_counts(result), strict=True):
            if not job.policy.enabled:
                report = ImageReport("none", count, count)
            elif not job.policy.selects:
                report = ImageReport(
                    job.policy.method,
                    visual_tokens=job.whole_tokens,
                    kept_tokens=count,
                    bypass_reason="budget_not_below_tokens" if job.area is None else None,
                )
            else:
                assert job.report is not None
                report = job.report
            reused = job.policy.enabled and not job.processed
            jobs.report.images.append(report.as_cached() if reused else report)


def _image_report(job: ImageJob, plan: PruningPlan, visual_tokens: int, kept: int) -> ImageReport:
    return ImageReport(
        method=job.policy.method,
        visual_tokens=visual_tokens,
        kept_tokens=kept,
        energy=plan.energy,
        nouns=job.nouns,
        text_fallback=job.text_fallback,
        bypass_reason=None if kept < visual_tokens else "budget_not_below_tokens",
    )


def _hash_of(*identity: object) -> str:
    """Of a pruned item."""
    return hashlib.sha256(repr((IDENTITY, *identity)).encode()).hexdigest()


def _no_data(job: ImageJob) -> ValueError:
    return ValueError(f"Cache miss for image {job.feature_key} but data is not provided.")


def _jobs_in(hf_kwargs: Mapping[str, object]) -> PromptJobs | None:
    jobs = hf_kwargs.get(PRUNING_KEY)
    return jobs if isinstance(jobs, PromptJobs) else None


def _without_key(hf_kwargs: Mapping[str, object]) -> Mapping[str, object]:
    return {key: value for key, value in hf_kwargs.items() if key != PRUNING_KEY}


def _only_image(image: Any) -> MultiModalDataItems:
    return MultiModalDataItems({"image": ImageProcessorItems([image])})


def _select_images(mm_items: MultiModalDataItems, indices: Sequence[int]) -> MultiModalDataItems:
    images = mm_items.get("image")
    if images is None:
        return mm_items
    return MultiModalDataItems({**mm_items, "image": ImageProcessorItems([images.data[i] for i in indices])})


def _size(mm_items: MultiModalDataItems, index: int) -> tuple[int, int]:
    """Height and width of an image, in pixels."""
    return _size_in(mm_items.get_items("image", ImageProcessorItems), index)


def _size_in(images: ImageProcessorItems, index: int) -> tuple[int, int]:
    size = images.get_image_size(index)
    return size.height, size.width

"""What becomes of the images of one prompt, in the order in which it happens.

`PromptJobs.settle` runs before vLLM's own processing: it reads the text, looks for what vLLM's cache holds, has the
other images encoded, plans them and makes their items. Then vLLM processes the prompt, with the images that stay in
pixels, and `PromptJobs.finish` reports.

The hash of a pruned item tells which tokens were kept. Features differ in their last bits between batches of the
encoder, and so, now and then, does what is kept of them: the same image under the same policy is another item then, and
none of vLLM's caches confuses the two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from PIL import Image
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.encoder import Encoded
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.image import NO_WORDS, Words, plan, preprocess, read_text, size_of
from vllm_vtprune.plugin.items import pruned_item
from vllm_vtprune.plugin.request import PRUNING_KEY, ImageRequest, PromptPruning
from vllm_vtprune.plugin.resolution import DynamicResolution
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport, StageRun, in_prompt_order
from vllm_vtprune.text import text_pipeline_name

if TYPE_CHECKING:
    from vllm_vtprune.plugin.processor import PruningProcessor

IDENTITY = "vtprune-4"
"""Part of the hash of every pruned item; to be changed when the same policy comes to keep other tokens than before."""


@dataclass(eq=False)
class ImageJob:
    """One image of a prompt: what is asked, and what was done.

    Attributes:
        asked: for it.
        data: the image; None where the client only names it.
        feature_key: of its features.
        item_hash: of the item that it becomes; the stock item's, until that is settled.
        words: that its choice is conditioned on.
        question: hash of image, policy and words.
        encoding: of an image that is planned, its features.
        item: of an image that was planned or scaled, what it became.
        whole_tokens: unpruned; 0 where they are not counted before vLLM's processing.
        area: in pixels, to which the image is scaled; None where it is not.
        processed: whether vLLM's cache lacked the item.
        report: of an image that was planned, now or before.
    """

    asked: ImageRequest
    data: Any
    feature_key: str
    item_hash: str
    words: Words = NO_WORDS
    question: str = ""
    encoding: Future[Encoded] | None = None
    item: MultiModalKwargsItem | None = None
    whole_tokens: int = 0
    area: int | None = None
    processed: bool = False
    report: ImageReport | None = None

    @property
    def policy(self) -> PruningPolicy:
        """What is asked."""
        return self.asked.policy

    @property
    def no_data(self) -> ValueError:
        """The error of an image that is only named, and of which too little is known."""
        return ValueError(f"Cache miss for image {self.feature_key} but data is not provided.")

    def report_of(self, kept: int) -> ImageReport:
        """The report of the image, of which so many tokens stand in the prompt."""
        report = self.report or ImageReport.of(self.policy, self.whole_tokens or kept, kept)
        return report.as_cached() if self.policy.enabled and not self.processed else report


@dataclass(frozen=True)
class PromptJobs:
    """Travels through vLLM's hooks in place of the client's value: nothing is kept on the processor itself.

    Attributes:
        processor: of the model.
        inputs: of the prompt, as stock vLLM takes them.
        stock_hashes: of every item of the prompt, by modality, as stock vLLM computes them.
        images: those of the prompt or, for the hooks that work on those, the ones that vLLM's cache lacks.
        report: of the prompt.
    """

    processor: PruningProcessor
    inputs: ProcessorInputs
    stock_hashes: Mapping[str, list[str]]
    images: Sequence[ImageJob]
    report: RequestReport

    @classmethod
    def settle(cls, processor: PruningProcessor, inputs: ProcessorInputs, pruning: PromptPruning) -> PromptJobs:
        """Settle what is done with each image, and the item that it becomes.

        Raises:
            ValueError: an image is named by its uuid, and what is needed of it is not known any more.
            CancelledError: the request was given up meanwhile.
            Exception: what encoding an image raised.
        """
        hashes = processor.stock_hashes(inputs)
        identified = compat.without_synthetic_uuids(inputs)
        keys = hashes if identified is inputs else processor.stock_hashes(identified)
        data = inputs.mm_data_items.get_items("image", ImageProcessorItems).data
        images = [ImageJob(*each) for each in zip(pruning.images, data, keys["image"], hashes["image"], strict=True)]
        jobs = cls(processor, inputs, hashes, images, RequestReport(untuned=not processor.family.tuned))
        try:
            for job in images:
                if job.policy.selects:
                    jobs._start(job)
                elif job.policy.enabled:
                    jobs._choose_area(job)
            jobs._plan_encoded()
        except BaseException:
            for job in images:
                if job.encoding is not None:
                    job.encoding.cancel()
            raise
        return jobs

    # 1. The text is read, and what vLLM's cache lacks is encoded; or it is settled how far an image is scaled

    def _start(self, job: ImageJob) -> None:
        """Have an image encoded, unless vLLM's cache holds what is asked for; then the job has its hash and report."""
        runtime, cache = self.processor.runtime, compat.cache_in_use(self.inputs)
        if job.policy.conditions_on_text:
            started = time.perf_counter()
            job.words = read_text(self.processor, job.policy, job.asked.text)
            self.report.text_pipeline = text_pipeline_name()
            self.report.add_timings({"text": time.perf_counter() - started})
        job.question = _hash_of(runtime.generation, job.item_hash, job.policy.selection_digest(), job.words.ids)
        known = runtime.planned.get(job.question)
        if known is not None and cache is not None and cache.is_cached([known.item_hash])[0]:
            job.item_hash = known.item_hash
            job.report = replace(known.report, nouns=job.words.nouns, text_fallback=job.words.fallback)
        else:
            job.encoding = self._encoding(job)

    def _encoding(self, job: ImageJob) -> Future[Encoded]:
        """The features of an image, which are encoded unless they are known or on their way."""
        runtime, early = self.processor.runtime, job.asked.early
        if early is not None and (early.key, early.generation) == (job.feature_key, runtime.generation):
            return early.features
        encoding = runtime.encoder.find(job.feature_key)
        if encoding is not None:
            return encoding
        if job.data is None:
            raise job.no_data
        prepared = preprocess(self.processor, job.data, self.inputs.hf_processor_mm_kwargs)
        return runtime.encoder.submit(job.feature_key, prepared)

    def _choose_area(self, job: ImageJob) -> None:
        """Have an image scaled, unless it has no more tokens than the budget as it is: then it stays the stock item."""
        assert isinstance(self.processor, DynamicResolution)
        runtime, hf_kwargs = self.processor.runtime, self.inputs.hf_processor_mm_kwargs
        if job.data is not None:
            runtime.image_sizes.put(job.feature_key, size_of(job.data))
        size = runtime.image_sizes.get(job.feature_key)
        if size is None:
            raise job.no_data
        job.whole_tokens, job.area = self.processor.area_for(job.policy.budget, size, hf_kwargs)
        if job.area is not None:
            job.item_hash = _hash_of(runtime.generation, job.item_hash, job.policy.method, job.area)

    # 2. What was encoded is planned

    def _plan_encoded(self) -> None:
        """Wait for the features of every image that is to be planned, and make their items."""
        encoded = [(job, job.encoding.result()) for job in self.images if job.encoding is not None]
        self.processor.runtime.count_hits(features for _, features in encoded)
        forwards = {features.forward for _, features in encoded if features.forward is not None}
        self.report.stages += [StageRun("encode", forward.began, forward.seconds) for forward in forwards]
        for job, features in encoded:
            self._make_item(job, features)

    def _make_item(self, job: ImageJob, encoded: Encoded) -> None:
        """Plan an image, and note for later requests what became of it."""
        planned = plan(self.processor, encoded.features, job.policy, job.words, job.feature_key)
        self.report.add_timings(planned.plan.timings)
        kept = planned.plan.kept.cpu()
        job.item = pruned_item(planned.embeds.cpu(), self.processor.fields_of(encoded.features, kept))
        job.item_hash = _hash_of(job.question, sha256(kept.numpy().tobytes()).hexdigest())
        job.report = planned.report
        self.processor.runtime.record_plan(job.question, job.item_hash, job.report)

    # 3. vLLM processes the prompt; its hooks call these

    def in_inputs(self) -> ProcessorInputs:
        """The inputs of the prompt with the jobs among them.

        An image that the client named by its uuid, without data, gets a stand-in if its item is there; else it stays
        missing and vLLM answers that its data is not there.
        """
        stand_in = Image.new("RGB", (1, 1))
        data = [stand_in if job.data is None and job.item is not None else job.data for job in self.images]
        return replace(
            self.inputs,
            mm_data_items=MultiModalDataItems({**self.inputs.mm_data_items, "image": ImageProcessorItems(data)}),
            hf_processor_mm_kwargs={**self.inputs.hf_processor_mm_kwargs, PRUNING_KEY: self},
        )

    @property
    def hashes(self) -> Mapping[str, list[str]]:
        """Of every item of the prompt, by modality."""
        return {**self.stock_hashes, "image": [job.item_hash for job in self.images]}

    def missing(self, is_cached: Sequence[bool]) -> PromptJobs:
        """The jobs of the images that vLLM's cache lacks."""
        return replace(self, images=[job for job, cached in zip(self.images, is_cached, strict=True) if not cached])

    def as_they_are(self) -> list[int]:
        """Which images stock vLLM makes the items of, now that it processes these.

        Raises:
            ValueError: an image is named by its uuid, and what was known of it is gone.
        """
        for job in self.images:
            job.processed = True
            if job.item is None and job.data is None:
                raise job.no_data
        return [index for index, job in enumerate(self.images) if job.item is None and job.area is None]

    def scale(self, hf_kwargs: Mapping[str, object]) -> None:
        """Make the items of the images that are scaled, each in its own way."""
        for job in self.images:
            if job.area is not None:
                assert isinstance(self.processor, DynamicResolution)
                job.item = self.processor.stock_item(job.data, self.processor.at_area(hf_kwargs, job.area))

    def items(self, stock: Sequence[MultiModalKwargsItem]) -> list[MultiModalKwargsItem]:
        """The item of each image, given those that stock vLLM has made."""
        rest = iter(stock)
        return [next(rest) if job.item is None else job.item for job in self.images]

    # 4. The prompt is reported

    def finish(self, placeholders: Mapping[str, Sequence[Any]], policy: PruningPolicy) -> RequestReport:
        """The report of the prompt.

        Args:
            placeholders: where the media of each modality stand in it.
            policy: of what is no image.
        """
        places = placeholders.get("image", ())
        images = [job.report_of(place.get_num_embeds()) for job, place in zip(self.images, places, strict=True)]
        self.report.images = in_prompt_order(images, placeholders, policy)
        self.processor.runtime.count_stages(self.report)
        return self.report


def _hash_of(*identity: object) -> str:
    """Of a pruned item."""
    return sha256(repr((IDENTITY, *identity)).encode()).hexdigest()

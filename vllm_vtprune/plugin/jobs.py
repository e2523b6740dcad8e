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
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from PIL import Image
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import DynamicResolution
from vllm_vtprune.plugin.image import ImageJob, preprocess, size_of
from vllm_vtprune.plugin.items import pruned_item
from vllm_vtprune.plugin.limits import DataMissing
from vllm_vtprune.plugin.request import PRUNING_KEY, PromptPruning
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import RequestReport, StageRun, in_prompt_order
from vllm_vtprune.text import text_pipeline_name

if TYPE_CHECKING:
    from vllm_vtprune.plugin.processor import PruningProcessor

IDENTITY = "vtprune-4"
"""Part of the hash of every pruned item; to be changed when the same policy comes to keep other tokens than before."""


@dataclass(frozen=True)
class PromptJobs:
    """Travels through vLLM's hooks in place of the client's value: nothing is kept on the processor itself.

    Attributes:
        processor: of the model.
        inputs: of the prompt, as stock vLLM takes them.
        stock_hashes: of every item of the prompt, by modality, as stock vLLM computes them.
        policy: of what is no image.
        images: those of the prompt or, for the hooks that work on those, the ones that vLLM's cache lacks.
        report: of the prompt.
    """

    processor: PruningProcessor
    inputs: ProcessorInputs
    stock_hashes: Mapping[str, list[str]]
    policy: PruningPolicy
    images: Sequence[ImageJob]
    report: RequestReport

    @classmethod
    def settle(cls, processor: PruningProcessor, inputs: ProcessorInputs, pruning: PromptPruning) -> PromptJobs:
        """Settle what is done with each image, and the item that it becomes.

        Raises:
            DataMissing: an image is named by its uuid, and what is needed of it is not known any more.
            CancelledError: the request was given up meanwhile.
            Exception: what encoding an image raised.
        """
        hashes = processor.stock_hashes(inputs)
        identified = compat.without_synthetic_uuids(inputs)
        keys = hashes if identified is inputs else processor.stock_hashes(identified)
        data = inputs.mm_data_items.get_items("image", ImageProcessorItems).data
        images = [
            replace(image, data=data[i], feature_key=keys["image"][i], item_hash=hashes["image"][i])
            for i, image in enumerate(pruning.images)
        ]
        jobs = cls(processor, inputs, hashes, pruning.policy, images, RequestReport(untuned=not processor.family.tuned))
        try:
            for job in images:
                if job.policy.selects:
                    jobs._place(job)
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

    def _place(self, job: ImageJob) -> None:
        """Read the text, and start what is to be done in this process."""
        if job.policy.conditions_on_text:
            started = time.perf_counter()
            job.read_text(self.processor)
            self.report.text_pipeline = text_pipeline_name()
            self.report.add_timings({"text": time.perf_counter() - started})
        placement, job.placement_reason = self.processor.place(job.policy)
        if placement == "api" or not self._leave_to_engine(job):
            self._start(job)

    def _leave_to_engine(self, job: ImageJob) -> bool:
        """Whether the engine selects the tokens of an image; then the job has its hash and, of a known image, report.

        It cannot where the client names the image by its uuid alone and vLLM's cache lacks it. This process may have
        its features.
        """
        runtime, cache = self.processor.runtime, compat.cache_in_use(self.inputs)
        key = _hash_of("engine", job.item_hash, job.policy.selection_digest(), job.noun_ids)
        is_cached = cache is not None and cache.is_cached([key])[0]
        if job.data is None and not is_cached and self.processor.engine_placement.choice == "auto":
            job.placement_reason = "the request names the image by its uuid alone"
            return False
        job.question = job.item_hash = key
        job.in_engine = True
        known = runtime.planned.get(key)
        if known is not None:
            job.report = replace(known[1], nouns=job.nouns, text_fallback=job.text_fallback)
        elif is_cached and job.data is not None:
            hf_kwargs = self.inputs.hf_processor_mm_kwargs
            job.leave_to_engine(self.processor, self.processor.stock_item(job.data, hf_kwargs), hf_kwargs)
        return True

    def _start(self, job: ImageJob) -> None:
        """Have an image encoded, unless vLLM's cache holds what is asked for; then the job has its hash and report."""
        runtime, cache = self.processor.runtime, compat.cache_in_use(self.inputs)
        job.question = _hash_of(runtime.generation, job.item_hash, job.policy.selection_digest(), job.noun_ids)
        known = runtime.planned.get(job.question)
        if known is not None and cache is not None and cache.is_cached([known[0]])[0]:
            job.item_hash, report = known
            job.report = replace(report, nouns=job.nouns, text_fallback=job.text_fallback)
            job.encoding = None
        elif job.encoded_as != (job.feature_key, runtime.generation):
            job.encoding = runtime.encoder.find(job.feature_key)
            if job.encoding is None:
                image = preprocess(self.processor, _data_of(job), self.inputs.hf_processor_mm_kwargs)
                job.encoding = runtime.encoder.submit(job.feature_key, image)

    def _choose_area(self, job: ImageJob) -> None:
        """Have an image scaled, unless it has no more tokens than the budget as it is: then it stays the stock item."""
        assert isinstance(self.processor, DynamicResolution)
        runtime, hf_kwargs = self.processor.runtime, self.inputs.hf_processor_mm_kwargs
        if job.data is not None:
            runtime.image_sizes.put(job.feature_key, size_of(job.data))
        size = runtime.image_sizes.get(job.feature_key) or size_of(_data_of(job))
        job.whole_tokens, job.area = self.processor.area_for(job.policy.budget, size, hf_kwargs)
        if job.area is not None:
            job.item_hash = _hash_of(runtime.generation, job.item_hash, job.policy.method, job.area)

    # 2. What was encoded is planned

    def _plan_encoded(self) -> None:
        """Wait for the features of every image that is to be planned; plan it, and note what became of it."""
        runtime = self.processor.runtime
        encoded = [(job, job.encoding.result()) for job in self.images if job.encoding is not None]
        runtime.count_hits(image for _, image in encoded)
        forwards = {image.forward for _, image in encoded if image.forward is not None}
        self.report.stages += [StageRun("encode", forward.began, forward.seconds) for forward in forwards]
        for job, image in encoded:
            plan, embeds = job.plan(self.processor, image.features)
            self.report.add_timings(plan.timings)
            kept = plan.kept.cpu()
            job.item = pruned_item(embeds.cpu(), self.processor.fields_of(image.features, kept))
            job.item_hash = _hash_of(job.question, sha256(kept.numpy().tobytes()).hexdigest())
            assert job.report is not None
            runtime.planned.put(job.question, (job.item_hash, replace(job.report, nouns=())))

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
            DataMissing: an image is named by its uuid, and what was known of it is gone.
        """
        for job in self.images:
            job.processed = True
            if job.item is None:
                _data_of(job)
        return [index for index, job in enumerate(self.images) if job.item is None and job.area is None]

    def scale(self, hf_kwargs: Mapping[str, object]) -> None:
        """Make the items of the images that are scaled, each in its own way."""
        for job in self.images:
            if job.area is not None:
                assert isinstance(self.processor, DynamicResolution)
                job.item = self.processor.stock_item(job.data, self.processor.at_area(hf_kwargs, job.area))

    def items(self, stock: Sequence[MultiModalKwargsItem]) -> list[MultiModalKwargsItem]:
        """The item of each image, given those that stock vLLM has made."""
        stock_items = iter(stock)
        items = []
        for job in self.images:
            if job.item is not None:
                items.append(job.item)
            elif job.in_engine:
                items.append(self._with_selection(job, next(stock_items)))
            else:
                items.append(next(stock_items))
        return items

    def _with_selection(self, job: ImageJob, item: MultiModalKwargsItem) -> MultiModalKwargsItem:
        item = job.leave_to_engine(self.processor, item, self.inputs.hf_processor_mm_kwargs)
        assert job.report is not None
        self.processor.runtime.planned.put(job.question, (job.item_hash, replace(job.report, nouns=())))
        return item

    # 4. The prompt is reported

    def finish(self, placeholders: Mapping[str, Sequence[Any]]) -> RequestReport:
        """The report of the prompt, in which the media of each modality stand at these places."""
        places = placeholders.get("image", ())
        images = [job.report_of(place.get_num_embeds()) for job, place in zip(self.images, places, strict=True)]
        self.report.images = in_prompt_order(images, placeholders, self.policy)
        self.processor.runtime.count_stages(self.report)
        return self.report


def _hash_of(*identity: object) -> str:
    """Of a pruned item."""
    return sha256(repr((IDENTITY, *identity)).encode()).hexdigest()


def _data_of(job: ImageJob) -> Any:
    if job.data is None:
        raise DataMissing(f"Cache miss for image {job.feature_key} but data is not provided.")
    return job.data

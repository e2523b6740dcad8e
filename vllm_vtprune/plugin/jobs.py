"""The steps that prune the images of one prompt, in order.

`PromptJobs.prepare` runs before vLLM's processing: it parses the text, looks up vLLM's processor cache, has the
remaining images encoded, plans them and makes their items. vLLM then processes the prompt with the unpruned images.
`PromptJobs.finish` makes the report.

The hash of a pruned item covers the kept tokens. Features differ in their last bits between encoder batches, and so may
the kept tokens. The same image under the same policy is then a different item, and vLLM's caches do not confuse them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from PIL import Image
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.allotment import Energies, allot
from vllm_vtprune.features import PreparedImage
from vllm_vtprune.options import RatioBudget, TokensBudget
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.family import DynamicResolution
from vllm_vtprune.plugin.image import ImageJob, lossless_steps, preprocess, size_of, view_of, with_steps
from vllm_vtprune.plugin.items import pruned_item
from vllm_vtprune.plugin.limits import DataMissing
from vllm_vtprune.plugin.request import PRUNING_KEY, PromptPruning
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import RequestReport, in_prompt_order
from vllm_vtprune.sent_plan import SentPlan
from vllm_vtprune.text import text_pipeline_name

if TYPE_CHECKING:
    from vllm_vtprune.plugin.processor import PruningProcessor

IDENTITY = "vtprune-7"
"""Part of the hash of every pruned item. Change it whenever an unchanged policy starts to keep other tokens."""


@dataclass(frozen=True)
class PromptJobs:
    """The images of one prompt. Passed through vLLM's hooks in the options, so the processor itself holds no state.

    Attributes:
        processor: the model's processor.
        inputs: the prompt's inputs, without the ``pruning`` entry.
        stock_hashes: vLLM's own hash of every item, by modality.
        policy: the request's policy, which applies to media other than images.
        images: the prompt's images; in some hooks only those missing in vLLM's processor cache.
        report: the prompt's report.
    """

    processor: PruningProcessor
    inputs: ProcessorInputs
    stock_hashes: Mapping[str, list[str]]
    policy: PruningPolicy
    images: Sequence[ImageJob]
    report: RequestReport

    @classmethod
    def prepare(cls, processor: PruningProcessor, inputs: ProcessorInputs, pruning: PromptPruning) -> PromptJobs:
        """Encode and plan the images, and make their items and hashes.

        Args:
            processor: the model's processor.
            inputs: the prompt's inputs, without the ``pruning`` entry.
            pruning: the parsed entry.

        Raises:
            DataMissing: the client sent only a uuid, and no cache holds the image.
            CancelledError: the request was cancelled.
            Exception: whatever encoding an image raised.
        """
        hashes = processor.stock_hashes(inputs)
        without_synthetic = compat.without_synthetic_uuids(inputs)
        keys = hashes if without_synthetic is inputs else processor.stock_hashes(without_synthetic)
        data = inputs.mm_data_items.get_items("image", ImageProcessorItems).data
        images = []
        for i, image in enumerate(pruning.images):
            steps, reason = lossless_steps(processor, image.policy)
            key, item_hash = (with_steps(by_modality["image"][i], steps) for by_modality in (keys, hashes))
            image = replace(image, index=i, data=data[i], feature_key=key, item_hash=item_hash)
            images.append(replace(image, lossless_reason=reason))
        jobs = cls(processor, inputs, hashes, pruning.policy, images, RequestReport(untuned=not processor.family.tuned))
        try:
            jobs._allot()
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

    # 0. Divide a budget for all images

    def _allot(self) -> None:
        """Give each image of a budget of scope "request" its part, as a budget in tokens of its own."""
        groups: list[list[ImageJob]] = []  # by policy: images of earlier turns keep theirs
        for job in self.images:
            plan = job.sent_plan
            if plan is not None:
                job.placement_reason, job.allotted = plan.placement_reason, plan.allotted_tokens
                if job.allotted is not None:
                    job.policy = job.policy.with_budget(TokensBudget(keep=job.allotted))
            elif job.policy.enabled and job.policy.budget.scope == "request":
                group = next((group for group in groups if group[0].policy == job.policy), None)
                groups.append([job]) if group is None else group.append(job)
        for group in groups:
            self._divide(group[0].policy, group)

    def _divide(self, policy: PruningPolicy, jobs: Sequence[ImageJob]) -> None:
        runtime, budget = self.processor.runtime, policy.budget
        assert isinstance(budget, RatioBudget | TokensBudget)
        if isinstance(budget, TokensBudget) and budget.keep < len(jobs):
            problem = f"{budget.keep} tokens cannot be divided over {len(jobs)} images"
            raise PolicyError("pruning.budget.keep", budget.keep, f"{len(jobs)} or more", problem)
        _, reason = self.processor.place(policy)
        for job in jobs:
            job.placement_reason = reason
            if runtime.energies.get(job.feature_key) is None:
                self._encode(job)
        images = [runtime.energies.get(job.feature_key) or self._measure(job) for job in jobs]
        for job, job.allotted in zip(jobs, allot(budget, images, type(policy.chosen)), strict=True):
            job.policy = policy.with_budget(TokensBudget(keep=job.allotted))

    def _measure(self, job: ImageJob) -> Energies:
        """Wait for an image's features and measure their energies."""
        assert job.encoding is not None
        encoded = job.encoding.result()
        started = time.perf_counter()
        energies = self.processor.runtime.measure(encoded, job.feature_key)
        self.report.add_timings({"budget": time.perf_counter() - started})
        return energies

    # 1. Parse the text and submit images to the encoder; or choose the area to which an image is resized

    def _place(self, job: ImageJob) -> None:
        """Parse the text; leave the selection to the engine, or submit the image to the encoder."""
        if job.policy.conditions_on_text:
            started = time.perf_counter()
            job.read_text(self.processor)
            self.report.text_pipeline = text_pipeline_name()
            self.report.add_timings({"text": time.perf_counter() - started})
        if job.sent_plan is not None:
            self._leave_to_engine(job)
            return
        if job.allotted is None:
            placement, job.placement_reason = self.processor.place(job.policy, return_kept=job.return_kept)
            if placement == "engine" and self._leave_to_engine(job):
                return
        self._start(job)

    def _leave_to_engine(self, job: ImageJob) -> bool:
        """Set the hash and, if it is cached, the report of an image whose tokens the engine or a producer selects.

        Returns:
            False for an image sent as a uuid only that vLLM's cache lacks: this process may have its features.
        """
        runtime, cache = self.processor.runtime, compat.cache_in_use(self.inputs)
        if job.sent_plan is None:
            key = _hash_of("engine", job.item_hash, job.policy.selection_digest(), job.noun_ids)
        else:
            key = _hash_of(self._plan_key(job), job.sent_plan.kept.runs)
        is_cached = cache is not None and cache.is_cached([key])[0]
        job.prepared = runtime.prepared.get(job.feature_key)
        missing = job.data is None and job.prepared is None and not is_cached
        if missing and self.processor.engine_placement.choice == "auto":
            job.placement_reason = "the request names the image by its uuid alone"
            return False
        job.plan_key = job.item_hash = key
        job.in_engine = True
        if job.prepared is None and not is_cached and lossless_steps(self.processor, job.policy)[0]:
            job.prepared = self._preprocess(job)
            runtime.prepared.put(job.feature_key, job.prepared)
        planned = runtime.planned.get(key)
        if planned is not None:
            job.reuse(planned[1])
        elif is_cached:
            job.leave_to_engine(self.processor, job.prepared or self._preprocess(job))
        return True

    def _start(self, job: ImageJob) -> None:
        """Submit an image to the encoder; if vLLM's cache holds its pruned item, take that hash and report instead.

        The table of reports holds no positions, so an image whose report needs them is planned again.
        """
        runtime, cache = self.processor.runtime, compat.cache_in_use(self.inputs)
        job.plan_key = self._plan_key(job)
        planned = None if job.return_kept or job.sends_plan else runtime.planned.get(job.plan_key)
        if planned is not None and cache is not None and cache.is_cached([planned[0]])[0]:
            job.item_hash, report = planned
            job.reuse(report)
            job.encoding = None
        else:
            self._encode(job)

    def _plan_key(self, job: ImageJob) -> str:
        generation = self.processor.runtime.generation
        return _hash_of(generation, job.item_hash, job.policy.selection_digest(), job.noun_ids)

    def _encode(self, job: ImageJob) -> None:
        """Submit an image to the encoder, unless this request has done so."""
        runtime = self.processor.runtime
        if job.early_key == (job.feature_key, runtime.generation):
            return
        job.early_key = job.feature_key, runtime.generation
        job.encoding = runtime.encoder.find(job.feature_key)
        if job.encoding is None:
            image = runtime.prepared.get(job.feature_key) or self._preprocess(job)
            job.encoding = runtime.encoder.submit(job.feature_key, image)

    def _preprocess(self, job: ImageJob) -> PreparedImage:
        """Preprocess an image, with the lossless steps of its policy."""
        return preprocess(self.processor, _data_of(job), self.inputs.hf_processor_mm_kwargs, job.policy)

    def _choose_area(self, job: ImageJob) -> None:
        """Choose the area to which an image is resized; an image within the budget stays the stock item."""
        assert isinstance(self.processor, DynamicResolution)
        runtime, hf_kwargs = self.processor.runtime, self.inputs.hf_processor_mm_kwargs
        if job.data is not None:
            runtime.image_sizes.put(job.feature_key, size_of(job.data))
        size = runtime.image_sizes.get(job.feature_key) or size_of(_data_of(job))
        job.unpruned_tokens, job.area = self.processor.area_for(job.policy.budget, size, hf_kwargs)
        if job.area is not None:
            job.item_hash = _hash_of(runtime.generation, job.item_hash, job.policy.method, job.area)

    # 2. Plan the encoded images

    def _plan_encoded(self) -> None:
        """Wait for the features of every submitted image, plan it, and make its item, hash and report."""
        runtime = self.processor.runtime
        encoded = [(job, job.encoding.result()) for job in self.images if job.encoding is not None]
        runtime.count_hits(image for _, image in encoded)
        self.report.stages += {image.forward for _, image in encoded if image.forward is not None}  # images share runs
        for job, image in encoded:
            planned = runtime.encoder.plan_image(image, job.policy, job.noun_ids, job.feature_key)
            job.describe(self.processor, planned)
            self.report.add_timings(planned.timings)
            job.item = pruned_item(planned.embeds, self.processor.position_fields(planned, planned.kept))
            job.item_hash = _hash_of(job.plan_key, planned.places.runs)
            assert job.report is not None
            runtime.planned.put(job.plan_key, (job.item_hash, replace(job.report, nouns=())))
            if job.return_kept or job.sends_plan:
                view = None if job.data is None else view_of(self.processor, job.policy, job.data)
                job.report = replace(job.report, kept=replace(planned.places, view=view))

    # 3. Called by vLLM's hooks while it processes the prompt

    def inputs_with_jobs(self) -> ProcessorInputs:
        """The prompt's inputs with these jobs in the options.

        An image sent as a uuid only gets stand-in data if its item exists; otherwise vLLM rejects it as missing.
        """
        stand_in = Image.new("RGB", (1, 1))
        data = [stand_in if job.data is None and (job.item or job.prepared) else job.data for job in self.images]
        return replace(
            self.inputs,
            mm_data_items=MultiModalDataItems({**self.inputs.mm_data_items, "image": ImageProcessorItems(data)}),
            hf_processor_mm_kwargs={**self.inputs.hf_processor_mm_kwargs, PRUNING_KEY: self},
        )

    @property
    def hashes(self) -> Mapping[str, list[str]]:
        """Hash of every item of the prompt, by modality."""
        return {**self.stock_hashes, "image": [job.item_hash for job in self.images]}

    def uncached(self, is_cached: Sequence[bool]) -> PromptJobs:
        """The jobs of the images missing in vLLM's processor cache."""
        return replace(self, images=[job for job, cached in zip(self.images, is_cached, strict=True) if not cached])

    def stock_indices(self) -> list[int]:
        """Mark the images as processed; indices of those whose items stock vLLM makes.

        Raises:
            DataMissing: the client sent only a uuid, and no cache holds the image.
        """
        for job in self.images:
            job.processed = True
            if job.item is None and job.prepared is None:
                _data_of(job)
        made = [job.item is not None or job.area is not None or job.prepared is not None for job in self.images]
        return [index for index, is_made in enumerate(made) if not is_made]

    def resize(self, hf_kwargs: Mapping[str, object]) -> None:
        """Make the items of resized images, each with its own area."""
        for job in self.images:
            if job.area is not None:
                assert isinstance(self.processor, DynamicResolution)
                job.item = self.processor.stock_item(job.data, self.processor.at_area(hf_kwargs, job.area))

    def items(self, stock: Sequence[MultiModalKwargsItem]) -> list[MultiModalKwargsItem]:
        """The item of each image: the pruned or resized item, else the next of ``stock``, maybe with a selection."""
        stock_items = iter(stock)
        items = []
        for job in self.images:
            if job.item is not None:
                items.append(job.item)
            elif job.in_engine:
                items.append(self._with_selection(job, stock_items))
            else:
                items.append(next(stock_items))
        return items

    def _with_selection(self, job: ImageJob, stock: Iterator[MultiModalKwargsItem]) -> MultiModalKwargsItem:
        runtime = self.processor.runtime
        if job.prepared is None:
            item, hf_kwargs = next(stock), self.inputs.hf_processor_mm_kwargs
            layout = self.processor.layout(item, size_of(job.data), hf_kwargs)
            job.prepared = PreparedImage(self.processor.without_padding(item, layout), layout)
            runtime.prepared.put(job.feature_key, job.prepared)
        item = job.leave_to_engine(self.processor, job.prepared)
        assert job.report is not None
        runtime.planned.put(job.plan_key, (job.item_hash, replace(job.report, nouns=())))
        return item

    # 4. Report

    def finish(self, placeholders: Mapping[str, Sequence[Any]]) -> RequestReport:
        """The prompt's report; ``placeholders`` are vLLM's ranges of the prompt, by modality."""
        ranges = placeholders.get("image", ())
        images = [job.report_of(place.get_num_embeds()) for job, place in zip(self.images, ranges, strict=True)]
        self.report.images = in_prompt_order(images, placeholders, self.policy)
        if any(job.sends_plan for job in self.images):
            plans = [SentPlan.of(image) for image in images]
            self.report.plans = [None if plan is None else plan.to_json() for plan in plans]
        self.processor.runtime.count_stages(self.report)
        return self.report


def _hash_of(*identity: object) -> str:
    return sha256(repr((IDENTITY, *identity)).encode()).hexdigest()


def _data_of(job: ImageJob) -> Any:
    if job.data is None:
        raise DataMissing(job.index, job.feature_key)
    return job.data

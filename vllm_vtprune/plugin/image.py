"""One image: its record from the request to the report, and the steps that concern one image only."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.budget import fixed_count
from vllm_vtprune.encoder import Encoded, PlannedImage
from vllm_vtprune.features import Box, Layout, PreparedImage, VisualFeatures
from vllm_vtprune.kept import KeptTokens, indices_of
from vllm_vtprune.lossless import Edges, crop_edges
from vllm_vtprune.options import RatioBudget, TokensBudget
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin.family import DynamicResolution
from vllm_vtprune.plugin.items import KEPT_POSITIONS, with_positions
from vllm_vtprune.plugin.placement import watched_inputs
from vllm_vtprune.plugin.prompt import noun_ids
from vllm_vtprune.plugin.selection import Selection
from vllm_vtprune.policy import OFF, PolicyError, PruningPolicy
from vllm_vtprune.report import ImageReport
from vllm_vtprune.selectors.method import LOSSLESS
from vllm_vtprune.selectors.uniform import Uniform
from vllm_vtprune.sent_plan import PLANS, SentPlan
from vllm_vtprune.text import TextFallback, read_prompt

if TYPE_CHECKING:
    from vllm_vtprune.plugin.processor import PruningProcessor

NO_OPTIONS: Mapping[str, Any] = {}
BLANK = Image.new("RGB", (64, 64))
"""Image for warm-up and for reading vLLM's placeholder."""


@dataclass(eq=False)
class ImageJob:
    """One image of a prompt: the request, the work in progress, and the report. The processor works on a copy.

    Attributes:
        policy: the image's policy, with the family's defaults if the model can be pruned.
        text: conditioning text; empty if the policy uses none.
        url, uuid: as the client sent them.
        index: index among the images of the prompt.
        detail: see `ImageReport`.
        encoding: future of the features.
        early_key: feature key and runtime generation of `encoding`.
        data: the decoded image; None if the client sent only a uuid.
        feature_key: key in the feature cache.
        item_hash: hash of vLLM's item for the image: the stock hash until the image is planned or resized.
        nouns, noun_ids: nouns of the text, and their token ids.
        text_fallback: see `ImageReport`.
        plan_key: hash of image, policy and text.
        item: item of a planned or resized image.
        unpruned_tokens: visual tokens before resizing, of an image whose method is `resize`; else 0.
        area: pixels to which the image is resized; None if it is not.
        processed: whether the item was missing in vLLM's processor cache.
        in_engine: whether the engine selects the image's tokens.
        prepared: the preprocessed image, if the engine selects its tokens and the image is cached.
        lossless_reason: see `ImageReport`.
        allotted: tokens allotted to the image by a budget for all images of the request; None for other budgets.
        placement_reason: see `ImageReport`.
        return_kept: whether the report says which tokens were kept.
        sends_plan: whether a producer reports the plan for a consumer.
        sent_plan: a producer's plan, which this consumer follows.
        report: report of a planned image, from this request or an earlier one.
    """

    policy: PruningPolicy
    text: str = ""
    url: str = ""
    uuid: str | None = None
    index: int = 0
    detail: str | None = None
    encoding: Future[Encoded[Any]] | None = None
    early_key: tuple[str, int] | None = None
    data: Any = None
    feature_key: str = ""
    item_hash: str = ""
    nouns: tuple[str, ...] = ()
    noun_ids: tuple[int, ...] = ()
    text_fallback: TextFallback | None = None
    plan_key: str = ""
    item: MultiModalKwargsItem | None = None
    unpruned_tokens: int = 0
    area: int | None = None
    processed: bool = False
    in_engine: bool = False
    prepared: PreparedImage | None = None
    lossless_reason: str | None = None
    allotted: int | None = None
    placement_reason: str | None = None
    return_kept: bool = False
    sends_plan: bool = False
    sent_plan: SentPlan | None = None
    report: ImageReport | None = None

    def read_text(self, processor: PruningProcessor) -> None:
        """Set `nouns`, `noun_ids` and `text_fallback` from `text`."""
        options = self.policy.text
        self.nouns, self.text_fallback = read_prompt(self.text, options.clean, options.modifiers)
        tokenizer = processor.info.get_tokenizer()
        self.noun_ids = tuple(token for noun in self.nouns for token in noun_ids(noun, tokenizer))

    def reuse(self, report: ImageReport) -> None:
        """Set `report` from that of an earlier request for the same image with this policy and these nouns."""
        self.report = replace(
            report,
            nouns=self.nouns,
            text_fallback=self.text_fallback,
            placement_reason=None if report.placement is None else self.placement_reason,
            allotted_tokens=self.allotted,
        )

    def describe(self, processor: PruningProcessor, planned: PlannedImage) -> None:
        """Set `report` from the plan of the encoded image.

        Raises:
            PolicyError: pruning would change the attention mask.
        """
        _require_same_mask(processor, self.policy, planned.tokens, len(planned.kept))
        self.report = self._report(
            planned.length,
            len(planned.embeds),
            planned.border_tokens,
            planned.duplicate_tokens,
            energy=planned.energy,
            placement="api",
            placement_reason=self.placement_reason,
            allotted_tokens=self.allotted,
        )

    def leave_to_engine(self, processor: PruningProcessor, image: PreparedImage) -> MultiModalKwargsItem:
        """Attach to vLLM's item of the image what the engine needs to select its tokens, and set `report`.

        Raises:
            PolicyError: pruning would change the attention mask, or a producer's plan does not fit the image.
        """
        plan, layout = self.sent_plan, image.layout
        if plan is None:
            return self._select_in_engine(processor, image, self.policy, self.count(layout), placement="engine")
        end = sum(plan.kept.runs[-1])
        if end > layout.num_tokens:
            raise self._wrong_plan(f"it keeps token {end - 1} of an image of {layout.num_tokens} tokens")
        kept = indices_of(plan.kept.runs)
        policy = self._policy_of_plan(processor, len(kept))
        facts = {"energy": plan.energy, "placement_reason": self.placement_reason, "allotted_tokens": self.allotted}
        item = self._select_in_engine(processor, image, policy, len(kept), placement="api", **facts)
        assert self.report is not None
        counts, sent = (self.report.kept_tokens, self.report.visual_tokens), (plan.kept_tokens, plan.visual_tokens)
        if counts != sent:
            raise self._wrong_plan("it keeps {} of {} tokens, here {} of {}".format(*sent, *counts))
        return with_positions(item, {**processor.position_fields(layout, kept), KEPT_POSITIONS: kept})

    def _select_in_engine(
        self, processor: PruningProcessor, image: PreparedImage, policy: PruningPolicy, keep: int, **measured: Any
    ) -> MultiModalKwargsItem:
        """The item of an image of which the engine keeps so many tokens under ``policy``; sets `report`."""
        layout = image.layout
        if not watched_inputs(policy, processor.family):
            layout = replace(layout, connector_rows=None)
        tokens = layout.num_tokens
        _require_same_mask(processor, self.policy, tokens, keep)
        duplicates = None if layout.distinct is None else tokens - len(layout.distinct)
        newlines = layout.newlines
        self.report = self._report(tokens + newlines, keep + newlines, layout.border_tokens, duplicates, **measured)
        return Selection(self.item_hash, policy, keep, self.noun_ids, layout).attach(image.item)

    def _policy_of_plan(self, processor: PruningProcessor, keep: int) -> PruningPolicy:
        """How the engine prunes the image if nothing is saved: it takes rows of the features, or merges them again."""
        policy = self.policy.with_budget(TokensBudget(keep=keep))
        if not policy.chosen.merges:
            return PruningPolicy(Uniform(budget=policy.budget))  # reads nothing inside the encoder
        no_hooks = processor.engine_placement.no_hooks
        if no_hooks and watched_inputs(policy, processor.family):
            problem = f"method {policy.method} merges tokens by what it reads inside the encoder, and {no_hooks}"
            raise self._wrong_plan(problem)
        return policy

    def _wrong_plan(self, problem: str) -> PolicyError:
        accepted = "a producer with the same model and options as this consumer"
        return PolicyError(f"{PLANS}.{self.index}", None, accepted, problem)

    def count(self, layout: Layout) -> int:
        """Tokens that a policy with a budget in tokens or as a ratio keeps of an image."""
        budget, layout = self.policy.budget, layout.without_duplicates()
        assert isinstance(budget, RatioBudget | TokensBudget)
        return min(fixed_count(budget, layout.num_tokens), self.policy.chosen.max_keep(layout))

    def _report(
        self, tokens: int, kept: int, border_tokens: int | None, duplicate_tokens: int | None, **measured: Any
    ) -> ImageReport:
        """The report of an image with so many tokens after its borders were cropped, of which so many are kept."""
        return ImageReport.of(
            self.policy,
            tokens + (border_tokens or 0),
            kept,
            nouns=self.nouns,
            text_fallback=self.text_fallback,
            border_tokens=border_tokens,
            duplicate_tokens=duplicate_tokens,
            lossless_reason=self.lossless_reason,
            **measured,
        )

    def report_of(self, kept: int) -> ImageReport:
        """The image's report; ``kept`` counts its tokens in the prompt."""
        report = self.report or ImageReport.of(self.policy, self.unpruned_tokens or kept, kept)
        if self.sent_plan is not None and self.return_kept:
            report = replace(report, kept=self.sent_plan.kept)
        return replace(report, detail=self.detail, cached=self.policy.enabled and not self.processed)


def _require_same_mask(processor: PruningProcessor, policy: PruningPolicy, tokens: int, kept: int) -> None:
    """Reject a budget that would change how an image's tokens attend to each other.

    With bidirectional attention inside images, sliding-window layers treat an image that exceeds the window
    differently: vLLM 0.32.0 bounds it in the kernel, or makes it causal (v1/worker/gpu/attn_utils.py,
    ``compute_mm_prefix_ranges``).
    """
    config = processor.model_config
    window = config.get_sliding_window() if config.is_mm_prefix_lm else None
    if window is not None and kept <= window < tokens:
        raise PolicyError(
            "pruning.budget",
            policy.budget,
            f"one that keeps more than {window} tokens, or an image of at most {window}",
            f"the {kept} kept tokens of the image fit into the sliding window of {window} and would attend to each "
            f"other in both directions, unlike its {tokens} tokens unpruned",
        )


def only_image(image: Any) -> MultiModalDataItems:
    """vLLM's multimodal data of a prompt with one image."""
    return MultiModalDataItems({"image": ImageProcessorItems([image])})


def size_of(image: Any) -> tuple[int, int]:
    """Height and width of an image, in pixels."""
    size = ImageProcessorItems([image]).get_image_size(0)
    return size.height, size.width


# Without a prompt; `image` may be anything that vLLM accepts as an image


def feature_key(
    processor: PruningProcessor,
    policy: PruningPolicy,
    image: Any,
    uuid: str | None = None,
    hf_kwargs: Mapping[str, object] = NO_OPTIONS,
    media_io_kwargs: Mapping[str, Mapping[str, Any]] = NO_OPTIONS,
) -> str:
    """Key of an image in the feature cache: vLLM's hash of the image (or uuid), HF options and decoder options, and the
    policy's lossless steps."""
    items, uuids = only_image(image), {"image": [uuid]}
    inputs = ProcessorInputs([], items, uuids, hf_processor_mm_kwargs=hf_kwargs, media_io_kwargs=media_io_kwargs)
    return with_steps(processor.stock_hashes(inputs)["image"][0], lossless_steps(processor, policy)[0])


def lossless_steps(processor: PruningProcessor, policy: PruningPolicy) -> tuple[tuple[str, ...], str | None]:
    """The lossless steps of a policy that this model takes, and why it takes no others; None if it takes all."""
    obstacles = {
        "crop_borders": "" if isinstance(processor, DynamicResolution) else "this model resizes images to fixed sizes",
        "dedup": ""
        if processor.family.drops_duplicates
        else "this model's visual tokens have no positions of their own",
    }
    steps = [name for name in LOSSLESS if policy.selects and getattr(policy.chosen, name)]
    reasons = [f"{name}: {obstacles[name]}" for name in steps if obstacles[name]]
    return tuple(name for name in steps if not obstacles[name]), "; ".join(reasons) or None


def with_steps(key: str, steps: tuple[str, ...]) -> str:
    """The hash of an image after these lossless steps."""
    return sha256(repr((key, steps)).encode()).hexdigest() if steps else key


def preprocess(
    processor: PruningProcessor,
    image: Any,
    hf_kwargs: Mapping[str, object] = NO_OPTIONS,
    policy: PruningPolicy = OFF,
) -> PreparedImage:
    """Preprocess an image for the encoder, with the lossless steps of its policy. Thread-safe."""
    steps, _ = lossless_steps(processor, policy)
    size = size_of(image)
    edges = crop_of(processor, policy, image)
    if edges is not None:
        image = (image.media if isinstance(image, MediaWithBytes) else image).crop(edges)
    item = processor.stock_item(image, hf_kwargs)
    layout = processor.layout(item, size_of(image), hf_kwargs)
    if "crop_borders" in steps:
        assert isinstance(processor, DynamicResolution)
        tokens = processor.num_tokens(size, hf_kwargs)
        layout = replace(layout, border_tokens=max(tokens - layout.num_tokens, 0))
    if "dedup" in steps:
        assert isinstance(processor, DynamicResolution)
        layout = replace(layout, distinct=processor.distinct_tokens(item))
    return PreparedImage(item, layout)


def crop_of(processor: PruningProcessor, policy: PruningPolicy, image: Any) -> Edges | None:
    """The part within an image's borders, if its policy crops them and the model takes images of any size.

    Raises:
        PolicyError: the image is an array.
    """
    if "crop_borders" not in lossless_steps(processor, policy)[0]:
        return None
    assert isinstance(processor, DynamicResolution)
    picture = image.media if isinstance(image, MediaWithBytes) else image
    if not isinstance(picture, Image.Image):
        raise PolicyError("pruning.crop_borders", True, "a Pillow image, or false", "the image is an array")
    return crop_edges(np.asarray(picture), processor.token_side)


def view_of(processor: PruningProcessor, policy: PruningPolicy, image: Any) -> Box:
    """The part of an image that reaches the encoder."""
    height, width = size_of(image)
    edges = crop_of(processor, policy, image)
    if edges is None:
        return processor.view(height, width)
    left, top, right, bottom = edges
    return top / height, left / width, bottom / height, right / width


def warm_up(processor: PruningProcessor) -> None:
    """Load the encoder and everything else that the first request would wait for; see `PruningRuntime.warm_up`."""
    processor.runtime.warm_up(preprocess(processor, BLANK))


def encode_image(processor: PruningProcessor, image: Any, policy: PruningPolicy = OFF) -> VisualFeatures:
    """Encode one image in this process, with the lossless steps of its policy."""
    key = feature_key(processor, policy, image)
    return processor.runtime.local.submit(key, preprocess(processor, image, policy=policy)).result().features


def plan_image(
    processor: PruningProcessor, image: Any, policy: PruningPolicy, query: str
) -> tuple[ImageReport, PruningPlan, VisualFeatures]:
    """Plan one image in this process under a policy that selects tokens, as a request would.

    Args:
        processor: the model's processor.
        image: the image.
        policy: the unresolved policy.
        query: the conditioning text.

    Returns:
        Report with the kept positions, plan, and features.

    Raises:
        PolicyError: the family lacks what the policy needs.
    """
    job = ImageJob(policy.resolve(processor.family), query)
    if job.policy.conditions_on_text:
        job.read_text(processor)
    _, job.lossless_reason = lossless_steps(processor, job.policy)
    encoder, features = processor.runtime.local, encode_image(processor, image, job.policy)
    plan = encoder.plan(features, job.policy, job.noun_ids)
    job.describe(processor, encoder.planned(features, plan))
    assert job.report is not None
    kept = KeptTokens.of(features, plan.kept, view_of(processor, job.policy, image))
    return replace(job.report, kept=kept), plan, features

"""One image: the record of it, from the client's request to the report, and what is done with it by itself."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.budget import fixed_count
from vllm_vtprune.encoder import Encoded
from vllm_vtprune.features import Layout, PreparedImage, VisualFeatures
from vllm_vtprune.options import RatioBudget, TokensBudget
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin.placement import watched_inputs
from vllm_vtprune.plugin.prompt import noun_ids
from vllm_vtprune.plugin.selection import Selection
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import ImageReport
from vllm_vtprune.sequence import sequence, sequence_length
from vllm_vtprune.text import TextFallback, read_prompt

if TYPE_CHECKING:
    from vllm_vtprune.plugin.processor import PruningProcessor

NO_OPTIONS: Mapping[str, Any] = {}
BLANK = Image.new("RGB", (64, 64))
"""The image that is encoded at the start."""


@dataclass(eq=False)
class ImageJob:
    """What is to be done with one image of a prompt and, afterwards, what was done. The processor works on a copy.

    Attributes:
        policy: its own; the family's defaults are filled in, where the model can be pruned.
        text: that the policy looks at; empty where it looks at none.
        url, uuid: as the client of a server wrote them.
        encoding: its features, on their way.
        encoded_as: key and generation of features that are encoded before the processor's turn.
        data: the image; None where the client only names it.
        feature_key: of its features.
        item_hash: of the item that it becomes; the stock item's, until that is settled.
        question: hash of image, policy and text.
        item: of an image that was planned or scaled.
        whole_tokens: of an image that may be scaled.
        area: in pixels, to which the image is scaled; None where it is not.
        processed: whether vLLM's cache lacked the item.
        in_engine: whether the engine selects the image's tokens.
        placement_reason: as of `ImageReport`.
        report: of an image that was planned, by this request or before.
    """

    policy: PruningPolicy
    text: str = ""
    url: str = ""
    uuid: str | None = None
    encoding: Future[Encoded] | None = None
    encoded_as: tuple[str, int] | None = None
    data: Any = None
    feature_key: str = ""
    item_hash: str = ""
    nouns: tuple[str, ...] = ()
    noun_ids: tuple[int, ...] = ()
    text_fallback: TextFallback | None = None
    question: str = ""
    item: MultiModalKwargsItem | None = None
    whole_tokens: int = 0
    area: int | None = None
    processed: bool = False
    in_engine: bool = False
    placement_reason: str | None = None
    report: ImageReport | None = None

    def read_text(self, processor: PruningProcessor) -> None:
        """Note the words that the policy conditions on."""
        options = self.policy.text
        self.nouns, self.text_fallback = read_prompt(self.text, options.clean, options.modifiers)
        tokenizer = processor.info.get_tokenizer()
        self.noun_ids = tuple(token for noun in self.nouns for token in noun_ids(noun, tokenizer))

    def plan(self, processor: PruningProcessor, features: VisualFeatures) -> tuple[PruningPlan, Tensor]:
        """The plan, and (T, d) what is to be prefilled; notes the report.

        Raises:
            PolicyError: the features lack what the policy asks for, or tokens would attend to each other otherwise.
        """
        plan = processor.runtime.plan(features, self.policy, self.noun_ids, self.feature_key)
        _refuse_other_mask(processor, self.policy, features.num_tokens, len(plan.kept))
        embeds = sequence(features, plan).to(processor.model_config.dtype)
        self.report = ImageReport.of(
            self.policy,
            sequence_length(features),
            len(embeds),
            energy=plan.energy,
            nouns=self.nouns,
            text_fallback=self.text_fallback,
            placement="api",
            placement_reason=self.placement_reason,
        )
        return plan, embeds

    def leave_to_engine(
        self, processor: PruningProcessor, item: MultiModalKwargsItem, hf_kwargs: Mapping[str, object]
    ) -> MultiModalKwargsItem:
        """vLLM's item of the image with what the engine needs to select its tokens; notes the report.

        Raises:
            PolicyError: tokens would attend to each other otherwise than unpruned.
        """
        layout = processor.layout(item, size_of(self.data), hf_kwargs)
        if not watched_inputs(self.policy, processor.family):
            layout = replace(layout, sources=None)  # where hooks would see the tokens
        tokens = layout.num_tokens
        keep = self.count(layout)
        _refuse_other_mask(processor, self.policy, tokens, keep)
        self.report = ImageReport.of(
            self.policy, tokens, keep, nouns=self.nouns, text_fallback=self.text_fallback, placement="engine"
        )
        return Selection(self.item_hash, self.policy, keep, self.noun_ids, layout).attach(item)

    def count(self, layout: Layout) -> int:
        """Tokens that a policy with a budget in tokens or as a ratio keeps of an image."""
        budget = self.policy.budget
        assert isinstance(budget, RatioBudget | TokensBudget)
        return min(fixed_count(budget, layout.num_tokens), self.policy.chosen.max_keep(layout))

    def report_of(self, kept: int) -> ImageReport:
        """The report of the image, of which that many tokens stand in the prompt."""
        report = self.report or ImageReport.of(self.policy, self.whole_tokens or kept, kept)
        return report.as_cached() if self.policy.enabled and not self.processed else report


def _refuse_other_mask(processor: PruningProcessor, policy: PruningPolicy, tokens: int, kept: int) -> None:
    """Refuse a budget with which an image's tokens would attend to each other otherwise than unpruned.

    Where they attend in both directions, layers with a sliding window treat an image that does not fit into the
    window otherwise than one that does: vLLM 0.32.0 bounds it in the kernel, or makes it causal
    (v1/worker/gpu/attn_utils.py, ``compute_mm_prefix_ranges``).
    """
    config = processor.model_config
    window = config.get_sliding_window() if config.is_mm_prefix_lm else None
    if window is not None and kept <= window < tokens:
        raise PolicyError(
            "pruning.budget",
            policy.budget,
            f"one that keeps more than {window}, or an image of no more tokens than that",
            f"{kept} of the {tokens} tokens of an image fit into the sliding window of {window}, in which they "
            "would attend to each other in both directions, as those of the whole image do not",
        )


def only_image(image: Any) -> MultiModalDataItems:
    """One image as vLLM's processors take those of a prompt."""
    return MultiModalDataItems({"image": ImageProcessorItems([image])})


def size_of(image: Any) -> tuple[int, int]:
    """Height and width of an image, in pixels."""
    size = ImageProcessorItems([image]).get_image_size(0)
    return size.height, size.width


# Without any prompt; `image` may be all that vLLM takes


def feature_key(
    processor: PruningProcessor,
    image: Any,
    uuid: str | None = None,
    hf_kwargs: Mapping[str, object] = NO_OPTIONS,
    media_io_kwargs: Mapping[str, Mapping[str, Any]] = NO_OPTIONS,
) -> str:
    """The key of an image's features, whoever has it encoded: with its uuid, HF processor's options, and decoder's."""
    items, uuids = only_image(image), {"image": [uuid]}
    inputs = ProcessorInputs([], items, uuids, hf_processor_mm_kwargs=hf_kwargs, media_io_kwargs=media_io_kwargs)
    return processor.stock_hashes(inputs)["image"][0]


def preprocess(processor: PruningProcessor, image: Any, hf_kwargs: Mapping[str, object] = NO_OPTIONS) -> PreparedImage:
    """An image as the tower takes it. May be called from any thread."""
    item = processor.stock_item(image, hf_kwargs)
    return PreparedImage(item, processor.layout(item, size_of(image), hf_kwargs))


def warm_up(processor: PruningProcessor) -> None:
    """Load the tower and what else the first request would wait for; see `PruningRuntime.warm_up`."""
    processor.runtime.warm_up(preprocess(processor, BLANK))


def encode_alone(processor: PruningProcessor, image: Any) -> VisualFeatures:
    """What the vision encoder makes of an image."""
    key = feature_key(processor, image)
    return processor.runtime.encoder.submit(key, preprocess(processor, image)).result().features


def plan_alone(
    processor: PruningProcessor, image: Any, policy: PruningPolicy, query: str
) -> tuple[ImageReport, PruningPlan, VisualFeatures]:
    """What a request would be told of an image under a policy that prunes; the plan; and what it was made from.

    Raises:
        PolicyError: the family lacks what the policy asks for.
    """
    job = ImageJob(policy.resolve(processor.family), query)
    if job.policy.conditions_on_text:
        job.read_text(processor)
    features = encode_alone(processor, image)
    plan, _ = job.plan(processor, features)
    assert job.report is not None
    return job.report, plan, features

"""One image by itself: what prompts, what runs before them and commands without an engine have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch import Tensor
from vllm.config import ModelConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plan import PruningPlan
from vllm_vtprune.plugin.prompt import noun_ids
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import ImageReport
from vllm_vtprune.sequence import sequence, sequence_length
from vllm_vtprune.text import TextFallback, read_prompt

if TYPE_CHECKING:
    from vllm_vtprune.plugin.processor import PruningProcessor

NO_OPTIONS: Mapping[str, Any] = {}

BLANK = 64
"""Pixels of the side of the image that is encoded at the start."""


def blank() -> Image.Image:
    """The image that is encoded at the start."""
    return Image.new("RGB", (BLANK, BLANK))


def only_image(image: Any) -> MultiModalDataItems:
    """One image as vLLM's processors take those of a prompt."""
    return MultiModalDataItems({"image": ImageProcessorItems([image])})


def size_of(image: Any) -> tuple[int, int]:
    """Height and width of an image, in pixels."""
    size = ImageProcessorItems([image]).get_image_size(0)
    return size.height, size.width


class Words(NamedTuple):
    """What a choice is conditioned on.

    Attributes:
        nouns: words of the text.
        ids: of their tokens.
        fallback: why the words are none, or every word of the text.
    """

    nouns: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    fallback: TextFallback | None = None


NO_WORDS = Words()


class Planned(NamedTuple):
    """What a policy makes of an image.

    Attributes:
        plan: which tokens are kept.
        embeds: (T, d) to be prefilled.
        report: of the image.
    """

    plan: PruningPlan
    embeds: Tensor
    report: ImageReport


def feature_key(
    processor: PruningProcessor,
    media: MediaWithBytes[Image.Image],
    uuid: str | None = None,
    hf_kwargs: Mapping[str, object] = NO_OPTIONS,
    media_io_kwargs: Mapping[str, Mapping[str, Any]] = NO_OPTIONS,
) -> str:
    """The key of an image's features, whoever has it encoded.

    Args:
        processor: of the model.
        media: the image.
        uuid: the client's name for it.
        hf_kwargs: of the HF processor.
        media_io_kwargs: how it was decoded.
    """
    items, uuids = only_image(media), {"image": [uuid]}
    inputs = ProcessorInputs([], items, uuids, hf_processor_mm_kwargs=hf_kwargs, media_io_kwargs=media_io_kwargs)
    return processor.stock_hashes(inputs)["image"][0]


def preprocess(processor: PruningProcessor, image: Any, hf_kwargs: Mapping[str, object] = NO_OPTIONS) -> PreparedImage:
    """An image as the tower takes it. May be called from any thread."""
    item = processor.stock_item(image, hf_kwargs)
    return PreparedImage(item, processor.layout(item, size_of(image), hf_kwargs))


def read_text(processor: PruningProcessor, policy: PruningPolicy, text: str) -> Words:
    """What a policy that conditions on text reads in it."""
    reading = read_prompt(text, policy.text.clean, policy.text.modifiers)
    tokenizer = processor.info.get_tokenizer()
    ids = tuple(token for noun in reading.nouns for token in noun_ids(noun, tokenizer))
    return Words(reading.nouns, ids, reading.fallback)


def plan(
    processor: PruningProcessor,
    features: VisualFeatures,
    policy: PruningPolicy,
    words: Words,
    key: str | None = None,
) -> Planned:
    """Choose the tokens of an image.

    Args:
        processor: of the model.
        features: of the image.
        policy: with the family's defaults filled in.
        words: to condition on.
        key: of the features.

    Raises:
        PolicyError: the features lack what the policy asks for, or the image's tokens would attend otherwise.
    """
    chosen = processor.runtime.plan(features, policy, words.ids, key)
    _refuse_other_mask(processor.model_config, policy, features.num_tokens, len(chosen.kept))
    embeds = sequence(features, chosen).to(processor.model_config.dtype)
    report = ImageReport.of(
        policy,
        sequence_length(features),
        len(embeds),
        energy=chosen.energy,
        nouns=words.nouns,
        text_fallback=words.fallback,
    )
    return Planned(chosen, embeds, report)


def _refuse_other_mask(config: ModelConfig, policy: PruningPolicy, tokens: int, kept: int) -> None:
    """Refuse a budget with which an image's tokens would attend to each other otherwise than unpruned.

    Where they attend in both directions, layers with a sliding window treat an image that does not fit into the
    window otherwise than one that does: vLLM 0.32.0 bounds it in the kernel, or makes it causal
    (v1/worker/gpu/attn_utils.py, ``compute_mm_prefix_ranges``).
    """
    window = config.get_sliding_window() if config.is_mm_prefix_lm else None
    if window is not None and kept <= window < tokens:
        raise PolicyError(
            "pruning.budget",
            policy.budget,
            f"one that keeps more than {window}, or an image of no more tokens than that",
            f"{kept} of the {tokens} tokens of an image fit into the sliding window of {window}, in which they "
            "would attend to each other in both directions, as those of the whole image do not",
        )


# Outside of any request


def warm_up(processor: PruningProcessor) -> None:
    """Load the tower and what else the first request would wait for; see `PruningRuntime.warm_up`."""
    processor.runtime.warm_up(preprocess(processor, blank()))


def encode_alone(processor: PruningProcessor, media: MediaWithBytes[Image.Image]) -> VisualFeatures:
    """What the vision encoder makes of one image."""
    prepared = preprocess(processor, media)
    return processor.runtime.encoder.submit(feature_key(processor, media), prepared).result().features


def plan_alone(
    processor: PruningProcessor, media: MediaWithBytes[Image.Image], policy: PruningPolicy, query: str
) -> tuple[ImageReport, PruningPlan, VisualFeatures]:
    """Choose the tokens of one image, with a policy that prunes.

    Returns:
        What a request would be told of it, the plan, and what it was made from.

    Raises:
        PolicyError: the family lacks what the policy asks for.
    """
    policy = policy.resolve(processor.family)
    words = read_text(processor, policy, query) if policy.conditions_on_text else NO_WORDS
    features = encode_alone(processor, media)
    planned = plan(processor, features, policy, words)
    return planned.report, planned.plan, features

"""Requests as they reach a model runner of vLLM, without an engine: items of the real processor, a model of our class.

Neither the vision encoder nor the language model is there: only positions can be asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.plugins import load_general_plugins

from tests.support.images import sample_images
from tests.support.qwen2_5_vl import IMAGE, VIDEO, Medium, QwenReference, ask_about
from vllm_vtprune.plugin.families.qwen2_5_vl import PrunedQwen2_5_VLForConditionalGeneration


@dataclass(frozen=True)
class Request:
    """What a runner gets of a request, and what it should make of it."""

    prompt_ids: list[int]
    features: list[MultiModalFeatureSpec]
    media: list[Medium]


def model_of(reference: QwenReference) -> PrunedQwen2_5_VLForConditionalGeneration:
    model = PrunedQwen2_5_VLForConditionalGeneration.__new__(PrunedQwen2_5_VLForConditionalGeneration)
    nn.Module.__init__(model)
    model.config = reference.model.config
    return model


def requests_to(
    checkpoint: Path, video: tuple[Any, dict[str, Any]]
) -> tuple[QwenReference, PrunedQwen2_5_VLForConditionalGeneration, list[Request]]:
    """Prompts with pruned, unpruned and no images, and a video; portrait and landscape."""
    load_general_plugins()
    config = ModelConfig(model=str(checkpoint), dtype="float32", max_model_len=4096, seed=0)
    assert config.uses_mrope
    assert isinstance(AutoConfig.from_pretrained(checkpoint).vision_config.spatial_merge_size, int)
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    reference = QwenReference(checkpoint)
    keep = {"budget": {"type": "tokens", "keep": 24}}
    tall, wide, square, other = (
        image.resize(size)
        for image, size in zip(sample_images(4), ((112, 448), (448, 112), (280, 280), (196, 252)), strict=True)
    )
    cases: list[tuple[str, list[Any], list[Any]]] = [
        (IMAGE, [tall], [keep]),
        (IMAGE + "then" + IMAGE, [wide, square], [keep, False]),
        (IMAGE + VIDEO + IMAGE, [square, tall], [False, keep]),
        (IMAGE, [other], [False]),
        (IMAGE * 2, [other, wide], [keep, keep]),
    ]
    requests = []
    for media, images, policies in cases:
        data: dict[str, Any] = {"image": images}
        if VIDEO in media:
            data["video"] = [video]
        processed = processor(
            ask_about("Where is the bus?", media),
            processor.info.parse_mm_data(data),
            hf_processor_mm_kwargs={"pruning": {"images": policies, "texts": [""] * len(images)}},
        )
        requests.append(_request(processed, reference, images, video))
    return reference, model_of(reference), requests


def _request(processed: Any, reference: QwenReference, images: Sequence[Any], video: tuple[Any, Any]) -> Request:
    features, media, pictures = [], [], iter(images)
    placed = [
        (place, modality, index)
        for modality, places in processed["mm_placeholders"].items()
        for index, place in enumerate(places)
    ]
    for place, modality, index in sorted(placed, key=lambda item: item[0].offset):
        item = processed["mm_kwargs"][modality][index]
        features.append(
            MultiModalFeatureSpec(item, modality, processed["mm_hashes"][modality][index], mm_position=place)
        )
        whole = reference.image(next(pictures)) if modality == "image" else reference.video(video[0], 1.0)
        if "kept_positions" in item and len(item["kept_positions"].data):
            whole = whole._replace(kept=item["kept_positions"].data)
        assert place.length == len(whole.kept)
        media.append(whole)
    return Request(processed["prompt_token_ids"], features, media)

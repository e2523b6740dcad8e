"""vLLM's processors in this process, without an engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.plugins import load_general_plugins


def config_of(checkpoint: Path, **options: Any) -> ModelConfig:
    """vLLM's configuration of a checkpoint, of which the plugin has been told. `options`: of the engine."""
    load_general_plugins()
    options = {"dtype": "float32", "max_model_len": 4096, "trust_remote_code": True, **options}
    return EngineArgs(model=str(checkpoint), **options).create_model_config()


def processor_of(checkpoint: Path, **options: Any) -> Any:
    return MULTIMODAL_REGISTRY.create_processor(config_of(checkpoint, **options))


def process_prompt(
    processor: Any,
    prompt: str | list[int],
    images: Sequence[Any],
    *,
    videos: Sequence[Any] = (),
    uuids: Sequence[str | None] | None = None,
    cache: Any = None,
    **options: object,
) -> Any:
    """What the engine is given of a prompt. `uuids`: of the images. `options`: of the multimodal processor."""
    media = {"image": list(images), "video": list(videos)}
    items = processor.info.parse_mm_data({name: data for name, data in media.items() if data}, validate=False)
    names = None if uuids is None else {"image": list(uuids)}
    return processor(prompt, items, names, hf_processor_mm_kwargs=options, cache=cache)


def features_of(processed: Any) -> list[MultiModalFeatureSpec]:
    """The media of a processed prompt as a model runner gets them, in the order of the prompt."""
    features = [
        MultiModalFeatureSpec(item, modality, mm_hash, mm_position=place)
        for modality, places in processed["mm_placeholders"].items()
        for item, mm_hash, place in zip(
            processed["mm_kwargs"][modality], processed["mm_hashes"][modality], places, strict=True
        )
    ]
    return sorted(features, key=lambda feature: feature.mm_position.offset)

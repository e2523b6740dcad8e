"""A model of an architecture that we prune, with a vision encoder that we cannot load: the report says why not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from vllm.config import ModelConfig
from vllm.model_executor.models.llava import LlavaMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.plugins import load_general_plugins

from vllm_vtprune.plugin.request import REPORT_KEY
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import unpruned_media
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_evaluation.photo import photograph

QUESTION = "USER: <image>\nWhere is the bus? ASSISTANT:"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a LLaVA that also hands the CLS token on."""
    checkpoint: Path = write_llava_checkpoint(tmp_path_factory.mktemp("full"), weights=False)
    for name in ("config.json", "processor_config.json"):
        config = json.loads((checkpoint / name).read_text())
        config["vision_feature_select_strategy"] = "full"
        (checkpoint / name).write_text(json.dumps(config))
    load_general_plugins()
    return MULTIMODAL_REGISTRY.create_processor(ModelConfig(str(checkpoint), dtype="float32", max_model_len=1024))


def process(processor: Any, image: Image.Image, **kwargs: object) -> Any:
    info = processor.info
    inputs = ProcessorInputs(
        info.get_tokenizer().encode(QUESTION),
        info.parse_mm_data({"image": [image]}),
        hf_processor_mm_kwargs=kwargs,
    )
    return processor.apply(inputs, TimingContext())


def test_its_images_pass_and_the_report_says_why(processor: Any) -> None:
    assert isinstance(processor, LlavaMultiModalProcessor)
    stock = process(processor, photograph())
    policy = {"method": "resprune", "images": [None]}
    asked = process(processor, photograph(), pruning=policy)
    assert asked["prompt_token_ids"] == stock["prompt_token_ids"]
    assert asked["mm_hashes"] == stock["mm_hashes"]
    [image] = asked[REPORT_KEY].images
    assert (image.visual_tokens, image.kept_tokens, image.bypass_reason) == (577, 577, "unsupported_model")
    [image] = process(processor, photograph(), pruning=False)[REPORT_KEY].images
    assert (image.method, image.bypass_reason) == ("none", None)


def test_media_of_another_name_are_reported_as_they_stand() -> None:
    """Some models make chunks of video of their images; others do not say where anything stands."""
    policy = PruningPolicy.parse("balanced")
    chunk = SimpleNamespace(offset=3, get_num_embeds=lambda: 64)
    [image] = unpruned_media([policy], {"vision_chunk": [chunk]}, policy, "unsupported_model")
    assert (image.visual_tokens, image.kept_tokens, image.bypass_reason) == (64, 64, "unsupported_model")
    assert unpruned_media([policy], {}, policy) == []


def test_a_wrong_policy_is_refused_all_the_same(processor: Any) -> None:
    with pytest.raises(PolicyError, match=r"mm_processor_kwargs\.pruning\.method"):
        process(processor, photograph(), pruning={"method": "no such"})

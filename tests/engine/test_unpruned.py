"""A model of an architecture that we prune, with a vision encoder that we cannot load: the report says why not."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.models.llava import LlavaMultiModalProcessor

from tests.support.processors import process_prompt, processor_of
from vllm_vtprune.plugin.request import REPORT_KEY
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import unpruned_media
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_evaluation.photo import photograph


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a LLaVA that also hands the CLS token on."""
    checkpoint = write_llava_checkpoint(tmp_path_factory.mktemp("full"), weights=False)
    for name in ("config.json", "processor_config.json"):
        config = json.loads((checkpoint / name).read_text())
        config["vision_feature_select_strategy"] = "full"
        (checkpoint / name).write_text(json.dumps(config))
    return processor_of(checkpoint)


def asked(processor: Any, **options: object) -> Any:
    return process_prompt(processor, "USER: <image>\nWhere is the bus? ASSISTANT:", [photograph()], **options)


def test_its_images_pass_and_the_report_says_why(processor: Any) -> None:
    assert isinstance(processor, LlavaMultiModalProcessor)
    stock, pruned = asked(processor), asked(processor, pruning={"method": "resprune", "images": [None]})
    assert pruned["prompt_token_ids"] == stock["prompt_token_ids"]
    assert pruned["mm_hashes"] == stock["mm_hashes"]
    [image] = pruned[REPORT_KEY].images
    assert (image.visual_tokens, image.kept_tokens, image.bypass_reason) == (577, 577, "unsupported_model")
    [image] = asked(processor, pruning=False)[REPORT_KEY].images
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
        asked(processor, pruning={"method": "no such"})
    with pytest.raises(PolicyError, match=r"^mm_processor_kwargs\.pruning\.txets: .*mean texts.*method, .*, images\."):
        asked(processor, pruning={"txets": ["Where?"]})

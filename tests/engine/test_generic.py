"""Models without a family of their own: which are pruned, and which vLLM serves as if the plugin were not there."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_architecture
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.plugins import load_general_plugins

from tests.support.families import write_intern_s1_checkpoint
from vllm_vtprune import PruningPolicy
from vllm_vtprune.families import ARCHITECTURES
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.families import generic
from vllm_vtprune.plugin.families.generic import GenericProcessor
from vllm_vtprune.plugin.model import PrunedModel
from vllm_vtprune.plugin.placeholders import Run
from vllm_vtprune.plugin.unpruned import UnprunedProcessor
from vllm_vtprune_checkpoints.gemma3 import write_gemma3_checkpoint
from vllm_vtprune_checkpoints.mistral3 import write_mistral3_checkpoint


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    load_general_plugins()
    return config_of(write_intern_s1_checkpoint(tmp_path_factory.mktemp("intern_s1")))


def config_of(checkpoint: Path) -> Any:
    return EngineArgs(model=str(checkpoint), dtype="float32", max_model_len=1024).create_model_config()


def test_another_architecture_is_pruned_by_what_its_images_become(model_config: Any) -> None:
    model, architecture = get_model_architecture(model_config)
    assert architecture == "InternS1ForConditionalGeneration"
    assert issubclass(model, PrunedModel)
    assert issubclass(model, InternS1ForConditionalGeneration)
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    assert isinstance(processor, GenericProcessor)
    assert not processor.family.tuned
    assert processor.family.inputs == {"text", "encoder"}


@pytest.mark.parametrize("write", [write_mistral3_checkpoint, write_gemma3_checkpoint])
def test_images_that_are_no_run_or_see_themselves_whole_are_not_pruned(write: Any, tmp_path: Path) -> None:
    """Mistral puts a token after each row; Gemma 3 attends in both directions."""
    config = config_of(write(tmp_path))
    model, _ = get_model_architecture(config)
    stock = compat.stock_factories(compat.stock_model(config.architecture) or model)
    info = stock.info(MULTIMODAL_REGISTRY._create_processing_ctx(config))
    processor = generic.build(info, stock.dummy_inputs(info), stock)
    assert isinstance(processor, UnprunedProcessor)
    assert not isinstance(processor, GenericProcessor)


@pytest.mark.parametrize("architecture", ["Qwen2VLForConditionalGeneration", "WhisperForConditionalGeneration"])
def test_positions_of_three_numbers_and_sounds_stay_vllm_s_own(architecture: str) -> None:
    assert getattr(generic, architecture) is compat.stock_model(architecture)


def test_every_multimodal_architecture_has_a_class() -> None:
    names = set(compat.multimodal_architectures())
    assert set(ARCHITECTURES) <= names
    with pytest.raises(AttributeError):
        _ = generic.NoSuchModel


def test_embeddings_by_clients_go_to_the_stock_code(monkeypatch: pytest.MonkeyPatch, model_config: Any) -> None:
    model, _ = get_model_architecture(model_config)
    monkeypatch.setattr(InternS1ForConditionalGeneration, "embed_multimodal", lambda self, **kwargs: sorted(kwargs))
    assert model.embed_multimodal(object.__new__(model), image_embeds=[1]) == ["image_embeds"]
    assert model.embed_multimodal(object.__new__(model), kept_embeds=[1]) == [1]


@pytest.mark.parametrize(
    ("tokens", "embeds", "run"),
    [
        ([7, 7, 7], None, Run((), 7, ())),
        ([1, 7, 7, 2], [7], Run((1,), 7, (2,))),
        ([1, 7, 3, 7, 2], [7], None),  # text between
        ([1, 7, 8, 2], [7, 8], None),  # tokens of two kinds
        ([1, 2], [7], None),  # none at all
    ],
)
def test_a_run_is_told_from_other_placeholders(tokens: list[int], embeds: list[int] | None, run: Run | None) -> None:
    content = PromptUpdateDetails(tokens) if embeds is None else PromptUpdateDetails.select_token_ids(tokens, embeds)
    assert Run.of(content) == run
    if run is not None:
        shorter = run.content(1)
        assert Run.of(shorter) == run
        assert shorter.full == [*run.before, run.token, *run.after]


def test_the_report_of_a_request_says_untuned(model_config: Any) -> None:
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    items = processor.info.parse_mm_data({"image": [Image.new("RGB", (60, 60))]})
    policy = {"method": "divprune", "budget": {"type": "tokens", "keep": 3}}
    inputs = ProcessorInputs([processor.image_token_id], items, hf_processor_mm_kwargs={"pruning": policy})
    report = processor.apply(inputs, TimingContext())["pruning"]
    assert report.to_json(PruningPolicy.parse(policy))["untuned"] is True
    assert [image.kept_tokens for image in report.images] == [3]

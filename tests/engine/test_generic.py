"""Models without a family of their own: which are pruned, and which vLLM serves as if the plugin were not there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.model_executor.model_loader import get_model_architecture
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails

from tests.support.families import write_intern_s1_checkpoint
from tests.support.processors import config_of, process_prompt
from vllm_vtprune import PruningPolicy
from vllm_vtprune.families import ARCHITECTURES
from vllm_vtprune.features import EMBED
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.families import generic
from vllm_vtprune.plugin.families.generic import GenericProcessor
from vllm_vtprune.plugin.model import PrunedModel
from vllm_vtprune.plugin.placeholders import Placeholder
from vllm_vtprune.plugin.unpruned import UnprunedProcessor
from vllm_vtprune_checkpoints.gemma3 import write_gemma3_checkpoint
from vllm_vtprune_checkpoints.mistral3 import write_mistral3_checkpoint
from vllm_vtprune_evaluation.photo import photograph


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return config_of(write_intern_s1_checkpoint(tmp_path_factory.mktemp("intern_s1")))


def test_another_architecture_is_pruned_by_what_its_images_become(model_config: Any) -> None:
    model, architecture = get_model_architecture(model_config)
    assert architecture == "InternS1ForConditionalGeneration"
    assert issubclass(model, PrunedModel)
    assert issubclass(model, InternS1ForConditionalGeneration)
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    assert isinstance(processor, GenericProcessor)
    assert not processor.family.tuned
    assert processor.family.inputs == {"text"}


def stock_of(checkpoint: Path) -> tuple[Any, Any, Any]:
    """As `generic.build` takes them, of a model that has a family of its own."""
    config = config_of(checkpoint)
    stock = compat.stock_factories(compat.stock_model(config.architecture))
    info = stock.info(MULTIMODAL_REGISTRY._create_processing_ctx(config))
    return info, stock.dummy_inputs(info), stock


def test_images_that_see_themselves_whole_are_not_pruned(tmp_path: Path) -> None:
    """Gemma 3 attends in both directions."""
    processor = generic.build(*stock_of(write_gemma3_checkpoint(tmp_path)))
    assert isinstance(processor, UnprunedProcessor)
    assert not isinstance(processor, GenericProcessor)


def test_text_between_the_tokens_of_an_image_stays(tmp_path: Path) -> None:
    """Mistral puts a token after each row."""
    processor = generic.build(*stock_of(write_mistral3_checkpoint(tmp_path)))
    assert isinstance(processor, GenericProcessor)
    image = photograph().resize((300, 200))
    counts, texts = [], []
    for keep in (1.0, 0.1):
        policy = {"method": "divprune", "budget": {"type": "ratio", "keep": keep}}
        prompt = process_prompt(processor, [processor.image_token_id], [image], pruning=policy)["prompt_token_ids"]
        texts.append([token for token in prompt if token != processor.image_token_id])
        counts.append(len(prompt) - len(texts[-1]))
    assert texts[0] == texts[1]
    assert (len(texts[0]), counts) == (8, [88, 9])


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


E = EMBED


@pytest.mark.parametrize(
    ("tokens", "embeds", "ids", "is_contiguous"),
    [
        ([7, 7, 7], None, (E, E, E), True),
        ([1, 7, 7, 2], [7], (1, E, E, 2), True),
        ([1, 7, 7, 3, 7, 2], [7], (1, E, E, 3, E, 2), False),
        ([1, 7, 8, 2], [7, 8], None, False),  # tokens of two kinds
        ([1, 2], [7], None, False),  # none at all
    ],
)
def test_what_stands_for_an_image_is_read_off_vllm_s_own(
    tokens: list[int], embeds: list[int] | None, ids: tuple[int, ...] | None, is_contiguous: bool
) -> None:
    content = PromptUpdateDetails(tokens) if embeds is None else PromptUpdateDetails.select_token_ids(tokens, embeds)
    placeholder = Placeholder.of(content)
    if ids is None:
        assert placeholder is None
        return
    assert placeholder == Placeholder(7, ids)
    assert Placeholder.of(placeholder.content()) == placeholder
    assert placeholder.content().full == tokens
    kept = placeholder.prune(torch.tensor([1]))
    assert kept.ids == tuple(token for place, token in enumerate(ids) if token != E or place == ids.index(E) + 1)
    assert placeholder.is_contiguous == is_contiguous
    if is_contiguous:
        assert placeholder.resized(1) == kept
        assert placeholder.resized(5).num_embeds == 5


def test_the_report_of_a_request_says_untuned(model_config: Any) -> None:
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    policy = {"method": "divprune", "budget": {"type": "tokens", "keep": 3}}
    image = Image.new("RGB", (60, 60))
    report = process_prompt(processor, [processor.image_token_id], [image], pruning=policy)["pruning"]
    assert report.to_json(PruningPolicy.parse(policy))["untuned"] is True
    assert [image.kept_tokens for image in report.images] == [3]

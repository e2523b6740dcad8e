"""The checkpoints of families with tiles: transformers and vLLM's chat templating read them like released ones."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.llava_next import write_llava_next_checkpoint
from vllm_vtprune_evaluation.photo import photograph

WRITERS: dict[str, Any] = {"llava_next": write_llava_next_checkpoint, "internvl": write_internvl_checkpoint}
MODELS = {"llava_next": LlavaNextForConditionalGeneration, "internvl": InternVLForConditionalGeneration}

PROMPTS = {
    "llava_next": "Be brief. USER: <image>\nWhat? ASSISTANT: A cat. USER: Its color? ASSISTANT:",
    "internvl": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nIts color?<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.fixture(scope="module", params=WRITERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[family](tmp_path_factory.mktemp(family), image_size=112)


def logits(directory: Path, family: str) -> torch.Tensor:
    model, loading = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert type(model) is MODELS[family]
    assert {kind: list(names) for kind, names in loading.items() if names} == {}
    processor = AutoProcessor.from_pretrained(directory)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=photograph(), text=prompt, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits[0, -1]


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_reads_the_same_model_from_every_naming(
    shards: int, family: str, checkpoint: Path, tmp_path: Path
) -> None:
    expected = logits(checkpoint, family)
    again = WRITERS[family](tmp_path / "module", image_size=112, naming="module", shards=shards)
    assert len(list(again.glob("*.safetensors"))) == shards
    torch.testing.assert_close(logits(again, family), expected, rtol=0, atol=0)
    other = WRITERS[family](tmp_path / "other", image_size=112, seed=1)
    assert not torch.allclose(logits(other, family), expected)


def test_the_chat_template(family: str, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Its color?"}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == PROMPTS[family]


def test_vllm_sees_that_the_chat_template_takes_parts(checkpoint: Path) -> None:
    hf = import_module("vllm.renderers.hf")
    template = (checkpoint / "chat_template.jinja").read_text()
    assert hf._detect_content_format(template, default="string") == "openai"


def test_released_shapes_without_weights(tmp_path: Path) -> None:
    for name, size, width in (("llava_next", "7b", 4096), ("internvl", "1b", 896)):
        directory = WRITERS[name](tmp_path / name, size=size, weights=False, dtype="bfloat16")
        assert not list(directory.glob("*.safetensors"))
        config = AutoConfig.from_pretrained(directory)
        assert config.text_config.hidden_size == width
        assert config.vision_config.hidden_size == 1024
        assert config.dtype == torch.bfloat16

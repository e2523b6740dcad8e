"""The demo checkpoint: transformers and vLLM's chat templating have to read it like a released one."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from vllm_vtprune_checkpoints import words
from vllm_vtprune_checkpoints.llava import Naming, llava_config, tiny_checkpoint, write_llava_checkpoint
from vllm_vtprune_evaluation.photo import photograph

PROMPT = "USER: <image>\nWhat is in front of the flag? ASSISTANT:"
NAMINGS: tuple[Naming, ...] = ("vllm", "transformers", "module")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return photograph()


def load(directory: Path, **options: Any) -> LlavaForConditionalGeneration:
    model, loading = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True, **options)
    assert {kind: list(names) for kind, names in loading.items() if names} == {}
    return model


def logits(model: LlavaForConditionalGeneration, processor: Any, image: Image.Image) -> torch.Tensor:
    with torch.inference_mode():
        return model(**processor(images=image, text=PROMPT, return_tensors="pt")).logits[0, -1]


def names_in(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert names.isdisjoint(tensors.keys()), "a tensor is in two shards"
            names |= set(tensors.keys())
    return names


@pytest.fixture(scope="module")
def reference(checkpoint: Path, processor: Any, photo: Image.Image) -> torch.Tensor:
    return logits(load(checkpoint), processor, photo)


@pytest.mark.parametrize(
    ("naming", "shards"), [("vllm", 1), ("vllm", 3), ("transformers", 1), ("module", 1), ("module", 2)]
)
def test_transformers_reads_the_same_model_from_every_naming(
    tmp_path: Path, processor: Any, photo: Image.Image, reference: torch.Tensor, naming: Naming, shards: int
) -> None:
    directory = write_llava_checkpoint(tmp_path, naming=naming, shards=shards)
    assert len(list(directory.glob("*.safetensors"))) == shards
    torch.testing.assert_close(logits(load(directory), processor, photo), reference, rtol=0, atol=0)


def test_the_namings_are_the_ones_found_in_the_wild(tmp_path: Path) -> None:
    released = {
        "language_model.lm_head.weight",
        "language_model.model.layers.1.mlp.gate_proj.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.3.self_attn.out_proj.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    }
    written = {naming: names_in(write_llava_checkpoint(tmp_path / naming, naming=naming)) for naming in NAMINGS}
    assert released <= written["vllm"]

    model = LlavaForConditionalGeneration(llava_config("tiny"))
    model.save_pretrained(tmp_path / "saved")
    assert written["transformers"] == names_in(tmp_path / "saved")
    assert written["module"] == set(model.state_dict())


def test_the_index_of_a_sharded_checkpoint_leads_to_every_tensor(tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = [file.stat().st_size for file in sorted(tmp_path.glob("*.safetensors"))]
    assert set(index["weight_map"]) == names_in(tmp_path)
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert 0 <= sum(sizes) - index["metadata"]["total_size"] < 20_000  # the rest is headers
    assert min(sizes) > 0.1 * sum(sizes), "the shards should be of similar size"


def test_a_seed_gives_the_same_files_and_another_seed_another_model(tmp_path: Path, checkpoint: Path) -> None:
    again = write_llava_checkpoint(tmp_path / "again")
    assert {file.name for file in again.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name
    other = write_llava_checkpoint(tmp_path / "other", seed=1)
    weights = "model.safetensors"
    assert (other / weights).read_bytes() != (checkpoint / weights).read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_bfloat16_is_in_the_file_and_in_the_configuration(tmp_path: Path) -> None:
    directory = write_llava_checkpoint(tmp_path, dtype="bfloat16")
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert AutoConfig.from_pretrained(directory).dtype == torch.bfloat16


def test_the_7b_checkpoint_without_weights_has_the_released_shapes(tmp_path: Path) -> None:
    directory = write_llava_checkpoint(tmp_path, size="7b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors*"))
    config = AutoConfig.from_pretrained(directory)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert sum(weight.numel() for weight in model.parameters()) == 7_063_427_072  # llava-hf/llava-1.5-7b-hf
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    assert max(tokenizer.get_vocab().values()) < config.text_config.vocab_size


def test_the_model_looks_at_every_part_of_the_picture(checkpoint: Path, processor: Any, photo: Image.Image) -> None:
    """Otherwise a test with this checkpoint could not tell a kept token from a dropped one."""
    model = load(checkpoint)
    inputs = processor(images=photo, text=PROMPT, return_tensors="pt")
    places = (inputs["input_ids"][0] == model.config.image_token_index).nonzero().flatten()
    assert len(places) == 576
    with torch.inference_mode():
        seen = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[0, places] = seen
        whole = model(inputs_embeds=embeds).logits[0, -1]
        for patch in (0, 23, 300, 575):
            others = torch.arange(embeds.shape[1]) != places[patch]
            change = (model(inputs_embeds=embeds[:, others]).logits[0, -1] - whole).abs().max()
            assert change > 0.05, f"dropping patch {patch} moves no logit by more than {change:.3f}"
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.7, "the patches of a photograph should differ"


def test_a_flat_picture_has_fewer_directions_than_a_photograph(
    checkpoint: Path, processor: Any, photo: Image.Image
) -> None:
    model = load(checkpoint)

    def directions(image: Image.Image) -> int:
        inputs = processor(images=image, text=PROMPT, return_tensors="pt")
        with torch.inference_mode():
            states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        energy = torch.linalg.svdvals(states[-2][0, 1:].double()) ** 2
        return int((energy.cumsum(0) / energy.sum() < 0.99).sum()) + 1

    assert directions(Image.new("RGB", (400, 300), (120, 130, 140))) < 16
    assert directions(photo) > 48


@settings(max_examples=200)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = tokenizer_of(tiny_checkpoint())
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


_tokenizers: dict[Path, Any] = {}


def tokenizer_of(directory: Path) -> Any:
    if directory not in _tokenizers:
        _tokenizers[directory] = AutoTokenizer.from_pretrained(directory)
    return _tokenizers[directory]


def test_every_word_of_the_corpus_is_one_token_after_a_space(checkpoint: Path) -> None:
    tokenizer = tokenizer_of(checkpoint)
    vocabulary = {*words.OBJECTS, *words.QUALITIES, *words.VERBS, *words.RELATIONS, *words.FUNCTION_WORDS}
    split = [word for word in vocabulary if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1]
    assert split == []
    inside, at_start = (tokenizer.encode(text, add_special_tokens=False) for text in (" bus", "bus"))
    assert inside != at_start
    assert tokenizer.encode("bus")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("<image>", add_special_tokens=False) == [tokenizer.image_token_id]


IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        pytest.param(
            [{"role": "user", "content": [IMAGE, text("What is it?")]}],
            "USER: <image>\nWhat is it? ASSISTANT:",
            id="one image",
        ),
        pytest.param(
            [{"role": "user", "content": [text("Compare"), IMAGE, text("and"), IMAGE]}],
            "USER: <image>\n<image>\nCompare and ASSISTANT:",
            id="several images come first",
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, text("Hi")]}],
            "USER: <image>\nHi ASSISTANT:",
            id="image_url",
        ),
        pytest.param(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [IMAGE, text("What is it?")]},
                {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": [text("Its color?"), IMAGE]},
            ],
            "Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat. USER: <image>\nIts color? ASSISTANT:",
            id="system message and several turns",
        ),
        pytest.param([{"role": "user", "content": "Hi"}], "USER: Hi ASSISTANT:", id="plain text"),
    ],
)
def test_the_chat_template_has_the_released_form(checkpoint: Path, messages: list[Any], prompt: str) -> None:
    tokenizer = tokenizer_of(checkpoint)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt


def test_vllm_sees_that_the_chat_template_takes_parts(checkpoint: Path) -> None:
    hf = import_module("vllm.renderers.hf")
    template = (checkpoint / "chat_template.jinja").read_text()
    assert hf._detect_content_format(template, default="string") == "openai"


def test_concurrent_first_uses_of_the_tiny_checkpoint_agree(tmp_path: Path) -> None:
    code = "from vllm_vtprune_checkpoints.llava import tiny_checkpoint as build; print(build())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=500)[0].strip() for process in processes}
    assert len(paths) == 1
    built = Path(paths.pop())
    assert built.parent.parent == tmp_path
    assert list(built.parent.iterdir()) == [built], "what the slower process built should be gone"
    assert (built / "model.safetensors").is_file()


def test_the_tiny_checkpoint_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = tiny_checkpoint()
    before = (built / "model.safetensors").stat().st_mtime_ns
    assert tiny_checkpoint() == built
    assert (built / "model.safetensors").stat().st_mtime_ns == before


def test_the_photograph_is_one(photo: Image.Image) -> None:
    assert photo.mode == "RGB"
    assert min(photo.size) >= 336
    assert len(photo.getcolors(1 << 20) or ()) > 10_000

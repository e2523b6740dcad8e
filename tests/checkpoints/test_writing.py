"""What checkpoints made on the spot share: files, tokenizers, and the one that is kept in the user's cache."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from tests.support.forked import run
from tests.support.samples import examples
from vllm_vtprune_checkpoints import FAMILIES, tiny_checkpoint, words
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_evaluation.photo import photograph


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"shards": 0}, "shards must be at least 1, not 0"), ({"size": "13b"}, "size must be one of tiny, small, 7b")],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_llava_checkpoint(tmp_path, **options)


def test_the_index_of_a_sharded_checkpoint_leads_to_every_tensor(checkpoint: Path, tmp_path: Path) -> None:
    write_llava_checkpoint(tmp_path, shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))}
    sizes = [(tmp_path / name).stat().st_size for name in files]
    assert list(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {tensor: name for name, tensors in files.items() for tensor in tensors}
    whole = load_file(checkpoint / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(files[file][tensor], whole[tensor]) for tensor, file in index["weight_map"].items())
    assert 0 <= sum(sizes) - index["metadata"]["total_size"] < 20_000  # the rest is headers
    assert min(sizes) > 0.1 * sum(sizes), "the shards should be of similar size"


def test_bfloat16_is_in_the_file_and_in_the_configuration(tmp_path: Path) -> None:
    directory = write_llava_checkpoint(tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(directory).dtype == torch.bfloat16


def test_the_7b_checkpoint_without_weights_has_the_released_ids(tmp_path: Path) -> None:
    directory = write_llava_checkpoint(tmp_path, size="7b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors*"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    assert max(tokenizer.get_vocab().values()) < AutoConfig.from_pretrained(directory).text_config.vocab_size


def test_a_flat_picture_has_fewer_directions_than_a_photograph(checkpoint: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)

    def directions(image: Image.Image) -> int:
        inputs = processor(images=image, text="<image>", return_tensors="pt")
        with torch.inference_mode():
            states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        energy = torch.linalg.svdvals(states[-2][0, 1:].double()) ** 2
        return int((energy.cumsum(0) / energy.sum() < 0.99).sum()) + 1

    assert directions(Image.new("RGB", (400, 300), (120, 130, 140))) < 16
    assert directions(photograph()) > 48


@examples(200)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = tokenizer_of(tiny_checkpoint())
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


@cache
def tokenizer_of(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def test_every_word_of_the_corpus_is_one_token_after_a_space(checkpoint: Path) -> None:
    tokenizer = tokenizer_of(checkpoint)
    vocabulary = {*words.OBJECTS, *words.QUALITIES, *words.VERBS, *words.RELATIONS, *words.FUNCTION_WORDS}
    split = [word for word in vocabulary if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1]
    assert split == []
    inside, at_start = (tokenizer.encode(text, add_special_tokens=False) for text in (" bus", "bus"))
    assert inside != at_start
    assert tokenizer.encode("bus")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("<image>", add_special_tokens=False) == [tokenizer.image_token_id]


def test_concurrent_first_uses_of_the_tiny_checkpoint_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from vllm_vtprune_checkpoints import tiny_checkpoint as build; print(build())"
    with ThreadPoolExecutor(2) as threads:
        paths = {done.stdout.strip() for done in threads.map(run, [code] * 2)}
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


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_a_tiny_checkpoint(family: str) -> None:
    config = json.loads((tiny_checkpoint(family) / "config.json").read_text())
    assert config["architectures"] == [FAMILIES[family][0]]

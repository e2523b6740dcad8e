"""Rows of the embedding table: from one file or shards, cached, and what is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_vtprune import token_table
from vllm_vtprune.token_table import INDEX, TokenTable
from vllm_vtprune.vision_encoder import EncoderError

NAME = "model.language_model.embed_tokens.weight"
TABLE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[TokenTable, list[int]]:
    """A table of 10 rows that caches two, and the list of ids that were read from it."""
    table, read = torch.arange(10.0)[:, None].repeat(1, 4), list[int]()
    monkeypatch.setattr(token_table, "ROW_CACHE", 2)

    def row(token_id: int) -> Tensor:
        read.append(token_id)
        return table[token_id]

    return TokenTable(row, 10, 4), read


def test_rows_are_read_once(counted: tuple[TokenTable, list[int]]) -> None:
    table, read = counted
    assert table.rows([3, 1, 3])[:, 0].tolist() == [3, 1, 3]
    assert table.rows((1, 2))[:, 0].tolist() == [1, 2]
    assert read == [3, 1, 2]
    assert table.rows([]).shape == (0, 4)


def test_the_cache_is_bounded_and_drops_the_least_recently_used(counted: tuple[TokenTable, list[int]]) -> None:
    table, read = counted
    assert table.rows([0, 1, 2, 3])[:, 0].tolist() == [0, 1, 2, 3]
    table.rows([2])
    table.rows([4])
    table.rows([2, 4])
    assert read == [0, 1, 2, 3, 4]
    table.rows([3])
    assert read[-1] == 3


@pytest.mark.parametrize("bad", [-1, 10])
def test_ids_outside_the_table(bad: int, counted: tuple[TokenTable, list[int]]) -> None:
    with pytest.raises(ValueError, match=f"token id {bad} is not in the embedding table; expected 0 to 9"):
        counted[0].rows([0, bad])


def test_several_threads(counted: tuple[TokenTable, list[int]]) -> None:
    table, wrong = counted[0], list[int]()

    def work(first: int) -> None:
        for step in range(200):
            ids = [(first + step + k) % 10 for k in range(3)]
            if table.rows(ids)[:, 0].tolist() != ids:
                wrong.append(first)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_random_rows_are_those_of_seed_and_id() -> None:
    table, same, other = (TokenTable.random(100, 512, seed) for seed in (0, 0, 1))
    assert torch.equal(table.rows([7, 99, 7]), same.rows([99, 7])[[1, 0, 1]])
    assert not torch.equal(table.rows([7]), other.rows([7]))
    assert not torch.equal(table.rows([7]), table.rows([8]))
    assert table.rows([7]).std() == pytest.approx(0.02, rel=0.2)
    assert table.rows([]).shape == (0, 512)
    assert TokenTable.random(10, 4, 2**31).rows([9]).shape == (1, 4)


@pytest.mark.parametrize("layout", ["one file", "shards", "files without index"])
def test_rows_of_a_checkpoint(layout: str, tmp_path: Path) -> None:
    """In any order, repeated, in the checkpoint's dtype."""
    if layout == "one file":
        save_file({NAME: TABLE, "lm_head.weight": torch.zeros(50, 8)}, tmp_path / "model.safetensors")
    else:
        save_file({"lm_head.weight": torch.zeros(50, 8)}, tmp_path / "a.safetensors")
        save_file({NAME: TABLE}, tmp_path / "b.safetensors")
    if layout == "shards":
        index(tmp_path, {"lm_head.weight": "a.safetensors", NAME: "b.safetensors"})
        save_file({NAME: torch.zeros(50, 8)}, tmp_path / "not-in-the-index.safetensors")
    table = TokenTable.of_checkpoint(tmp_path, 8)
    assert (table.size, table.dim) == TABLE.shape
    for ids in ([49, 0, 7, 7, 3, 49], range(50)):
        rows = table.rows(ids)
        assert torch.equal(rows, TABLE[list(ids)])
        assert rows.dtype == TABLE.dtype
        assert rows.untyped_storage().nbytes() == rows.nbytes


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "transformer.wte.weight", "x.word_embeddings.weight"])
def test_names_of_other_language_models(name: str, tmp_path: Path) -> None:
    save_file({name: TABLE}, tmp_path / "model.safetensors")
    assert torch.equal(TokenTable.of_checkpoint(tmp_path, 8).rows([5]), TABLE[[5]])


def test_the_table_of_the_language_model_is_told_by_its_width(tmp_path: Path) -> None:
    save_file({"audio.embed_tokens.weight": torch.zeros(3, 4), NAME: TABLE}, tmp_path / "model.safetensors")
    assert torch.equal(TokenTable.of_checkpoint(tmp_path, 8).rows([5]), TABLE[[5]])


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ({NAME: torch.zeros(50, 8, dtype=torch.int8)}, f"{NAME} is I8 of shape (50, 8)"),
        ({NAME: torch.zeros(50, 6)}, f"{NAME} is F32 of shape (50, 6)"),
        ({NAME: torch.zeros(8)}, f"{NAME} is F32 of shape (8,)"),
        ({f"{NAME[:-6]}qweight": torch.zeros(50, 1, dtype=torch.int32)}, "holds no embedding table"),
    ],
)
def test_no_table_or_one_that_is_quantised_or_does_not_fit(
    stored: dict[str, Tensor], problem: str, tmp_path: Path
) -> None:
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError) as error:
        TokenTable.of_checkpoint(tmp_path, 8)
    assert problem in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(EncoderError, match=r"holds no \*\.safetensors"):
        TokenTable.of_checkpoint(tmp_path, 8)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "1.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(EncoderError, match=r"1\.safetensors cannot be read as safetensors"):
        TokenTable.of_checkpoint(tmp_path, 8)
    save_file({"a": torch.zeros(1)}, path)
    index(tmp_path, {NAME: "2.safetensors"})
    with pytest.raises(EncoderError, match=r"2\.safetensors cannot be read as safetensors"):
        TokenTable.of_checkpoint(tmp_path, 8)
    index(tmp_path, {NAME: "1.safetensors"})
    with pytest.raises(EncoderError, match=rf"1\.safetensors does not hold '{NAME}'"):
        TokenTable.of_checkpoint(tmp_path, 8)
    for text in ("{", "{}", "[]", '{"weight_map": [1]}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(EncoderError, match="is not a safetensors index"):
            TokenTable.of_checkpoint(tmp_path, 8)


def index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

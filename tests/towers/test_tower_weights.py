"""The checkpoint reader: layouts it reads, and what it says about those it cannot."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vllm_vtprune.towers.weights import CheckpointReader, TowerError, load_into


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_shards_and_files_without_index(tmp_path):
    tensors = {f"t{i}": torch.full((2, 3), float(i)) for i in range(4)}
    for layout, parts in {"one": ["model"], "shards": ["a", "b"], "loose": ["a", "b", "c"]}.items():
        directory = tmp_path / layout
        directory.mkdir()
        weight_map = {name: f"{parts[i % len(parts)]}.safetensors" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
        if layout == "shards":
            write_index(directory, weight_map)
            save_file({"t0": torch.zeros(1)}, directory / "not-in-the-index.safetensors")
        reader = CheckpointReader(directory)
        assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items()), layout
        assert reader.plan(dict.fromkeys(tensors, (2, 3))) == {name: name for name in tensors}


def test_rows_in_any_order_and_repeated(tmp_path):
    table = torch.randn(50, 8, dtype=torch.bfloat16)
    save_file({"old.table": table}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path, {"table": ("new.table", "old.table")})
    for indices in ([49, 0, 7, 7, 3, 49], [], range(50)):
        rows = reader.rows("table", indices)
        assert torch.equal(rows, table[list(indices)])
        assert rows.dtype == table.dtype
    for index in (-1, 50):
        with pytest.raises(ValueError, match=f"row {index} of table does not exist: it has rows 0 to 49"):
            reader.rows("table", [0, index])


def test_aliases_are_tried_in_order(tmp_path):
    tensors = {name: torch.zeros(1) for name in ("first.w", "second.w", "second.v")}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path, {"x.": ("first.", "second.")})
    assert reader.plan({"x.w": (1,), "x.v": (1,)}) == {"x.w": "first.w", "x.v": "second.v"}
    assert reader.find("x.u") is None
    assert reader.candidates("y") == ("y",)
    with pytest.raises(TowerError, match=r"holds no x.u \(tried first.u, second.u\)"):
        reader.get("x.u")


def test_no_safetensors(tmp_path):
    with pytest.raises(TowerError, match="holds no weights at all"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(TowerError, match=r"only pytorch_model.bin; .* \*.safetensors"):
        CheckpointReader(tmp_path)
    with pytest.raises(TowerError, match="is not a directory"):
        CheckpointReader(tmp_path / "absent")


def test_missing_shard_and_broken_index(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    with pytest.raises(TowerError, match=r"2 of the 3 files .* are missing: 2.safetensors, 3.safetensors"):
        CheckpointReader(tmp_path)
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"})
    with pytest.raises(TowerError, match=r"1.safetensors does not hold 'b'"):
        CheckpointReader(tmp_path).plan({"b": (1,)})
    for text in ("{", "{}", "[]", '{"weight_map": [1]}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(TowerError, match="is not a safetensors index"):
            CheckpointReader(tmp_path)


def test_damaged_file_and_name_in_two_files(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(TowerError, match=r"both 1\.safetensors and 2\.safetensors hold 'a'"):
        CheckpointReader(tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TowerError, match=r"2.safetensors cannot be read as safetensors"):
        CheckpointReader(tmp_path)


def test_missing_tensors_are_counted_and_listed(tmp_path):
    save_file({"v.a": torch.zeros(1)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path, {"x.": ("v.", "w.")})
    with pytest.raises(TowerError) as error:
        reader.plan({f"x.{letter}": (1,) for letter in "abcdefg"})
    message = str(error.value)
    assert str(tmp_path) in message
    assert "6 of the vision tower's 7 tensors are missing" in message
    assert "x.b, x.c, x.d, x.e and 2 more" in message
    assert "tried for the first: v.b, w.b" in message


@pytest.mark.parametrize(
    "stored", [{"p.qweight": torch.zeros(4, dtype=torch.int32)}, {"p.weight": torch.zeros(4, dtype=torch.int8)}]
)
def test_quantised_weights(stored, tmp_path):
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(TowerError, match=r"1 of the vision tower's tensors are quantised: x\.weight; expected"):
        CheckpointReader(tmp_path, {"x.": ("p.",)}).plan({"x.weight": (4,)})


def test_no_tensor_is_read_twice(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(TowerError, match="would read these tensors twice: w"):
        CheckpointReader(tmp_path, {"a": ("w",), "b": ("w",)}).plan({"a": (1,), "b": (1,)})


def test_load_into_reads_every_tensor_once(tmp_path, monkeypatch):
    layer = torch.nn.Linear(3, 2)
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    read = []
    get = reader.get
    monkeypatch.setattr(reader, "get", lambda name: (read.append(name), get(name))[1])
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 2)
    load_into(empty, reader, device=torch.device("cpu"), dtype=torch.float64)
    assert sorted(read) == ["bias", "weight"]
    assert empty.weight.dtype == torch.float64
    assert torch.equal(empty.weight.float(), layer.weight)
    assert not empty.weight.requires_grad
    assert not empty.training

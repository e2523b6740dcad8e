"""Loading by architecture, the device, the cache of token rows, and what towers must not import."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.towers import TowerError, VisionTower, base, load_tower
from vllm_vtprune.towers.base import TokenTable, random_table, resolve_device


class NoTower(VisionTower):
    def encode(self, pixel_values: torch.Tensor) -> list[VisualFeatures]:
        return []

    def blank(self) -> dict[str, torch.Tensor]:
        return {}


@pytest.fixture
def counted():
    """A tower over a table of 10 rows, and the list of ids that were read from it."""
    table, read = torch.arange(10.0)[:, None].repeat(1, 4), []

    def rows(ids):
        read.extend(ids)
        return table[list(ids)]

    return NoTower(torch.nn.Linear(2, 2), TokenTable(rows, 10, 4), weights="checkpoint"), read


def test_token_rows_are_cached(counted):
    tower, read = counted
    assert tower.token_rows([3, 1, 3])[:, 0].tolist() == [3, 1, 3]
    assert tower.token_rows((1, 2))[:, 0].tolist() == [1, 2]
    assert read == [3, 1, 2]
    assert tower.token_rows([]).shape == (0, 4)


def test_the_row_cache_is_bounded_and_drops_the_least_recently_used(counted, monkeypatch):
    tower, read = counted
    monkeypatch.setattr(base, "ROW_CACHE", 2)
    assert tower.token_rows([0, 1, 2, 3])[:, 0].tolist() == [0, 1, 2, 3]
    tower.token_rows([2])
    tower.token_rows([4])
    tower.token_rows([2, 4])
    assert read == [0, 1, 2, 3, 4]
    tower.token_rows([3])
    assert read[-1] == 3


@pytest.mark.parametrize("bad", [-1, 10])
def test_ids_outside_the_table(counted, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not in the embedding table: expected 0 to 9"):
        counted[0].token_rows([0, bad])


def test_a_tensor_that_nothing_filled_is_an_error():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(TowerError, match="nothing has filled: weight, bias"):
        NoTower(module, random_table(10, 4, 0), weights="dummy")


def test_unknown_architecture():
    with pytest.raises(TowerError, match=r"'NoSuchModel'; supported: .*, LlavaForConditionalGeneration"):
        load_tower(Path(), architecture="NoSuchModel", hf_config=None, dtype=torch.float32)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(TowerError, match="device 'cuda' is not there: this process sees 0 GPUs"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(TowerError, match="this process sees 2 GPUs"):
        resolve_device("cuda:2")


def test_towers_do_not_import_vllm():
    code = "import sys, vllm_vtprune.envs, vllm_vtprune.towers.llava; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""The weights and the device of the vision encoder: which are loaded, which are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.engine.vision.references import ROWS, Row, encoder_of, noise, write
from tests.support.samples import fifth
from vllm_vtprune.plugin.image import preprocess
from vllm_vtprune.vision_encoder import EncoderError


@pytest.mark.parametrize("family", fifth(ROWS), indirect=True, scope="module")
def test_random_weights_keep_tokens_apart(
    family: str, processor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And are those of the seed; no weights are read."""
    monkeypatch.setenv("VTPRUNE_LOAD_FORMAT", "dummy")
    directory = write(family, tmp_path, weights=False)
    base, same, other = (encoder_of(directory, seed=seed) for seed in (0, 0, 1))
    assert base.weights == "dummy"
    image = preprocess(processor, noise(300, 300))
    first, again, different = (encoder.encode([image])[0] for encoder in (base, same, other))
    unit = torch.nn.functional.normalize(first.embeds - first.embeds.mean(dim=0), dim=1)
    assert (unit @ unit.T).fill_diagonal_(0).abs().max() < 0.99
    assert torch.equal(first.embeds, again.embeds)
    assert not torch.allclose(first.embeds, different.embeds)
    assert torch.equal(base.token_rows([3]), same.token_rows([3]))
    assert not torch.equal(base.token_rows([3]), other.token_rows([3]))


def changed(directory: Path, ending: str, change: Any) -> tuple[str, Path]:
    """The first tensor of the checkpoint whose name ends so, and the checkpoint with another value, or none, for it."""
    shutil.copytree(directory, copy := directory.with_name(f"{directory.name}-{ending}-changed"), dirs_exist_ok=True)
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith(ending))
    value = change(weights.pop(name))
    save_file(weights | ({} if value is None else {name: value}), copy / "model.safetensors", {"format": "pt"})
    return name, copy


def test_a_tensor_that_is_missing_or_does_not_fit(row: Row, checkpoint: Path) -> None:
    connector = row.file_name
    name = next(name for name in load_file(checkpoint / "model.safetensors") if f"{connector}." in name)
    _, without = changed(checkpoint, name, lambda _: None)
    with pytest.raises(EncoderError, match=f"{connector}.*{name.rsplit(connector)[1]}"):
        encoder_of(without)
    _, other = changed(checkpoint, name, lambda weights: weights[:-1])
    with pytest.raises(EncoderError, match=name):
        encoder_of(other)


def test_a_part_of_the_attention_that_is_missing(checkpoint: Path) -> None:
    """vLLM has queries, keys and values in one matrix."""
    stored = [name for name in load_file(checkpoint / "model.safetensors") if "vis" in name]
    name = next(name for name in stored if name.endswith(("k_proj.weight", "k_proj.linear.weight", "qkv.weight")))
    _, without = changed(checkpoint, name, lambda _: None)
    with pytest.raises(EncoderError, match=re.split("k_proj|qkv", name.removeprefix("model."))[0]):
        encoder_of(without)


def test_another_device_than_vllm_s_is_refused(model_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTPRUNE_DEVICE", "cuda:0")
    with pytest.raises(EncoderError, match=r"on the CPU, not on cuda:0; set VTPRUNE_DEVICE to auto"):
        _ = MULTIMODAL_REGISTRY.create_processor(model_config).runtime.local.vision_encoder


def test_several_layers_side_by_side_in_llava(tmp_path: Path) -> None:
    """vLLM's class does not have them: it reads one layer, for which the connector of the checkpoint is too wide."""
    with pytest.raises(EncoderError, match=r"multi_modal_projector\.linear_1\.weight"):
        encoder_of(write("llava", tmp_path, feature_layer=[-3, -2]))

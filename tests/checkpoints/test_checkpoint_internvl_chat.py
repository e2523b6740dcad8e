"""InternVL checkpoints in their authors' layout: vLLM reads them, and the weights are those of transformers' layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from vllm.model_executor.models.internvl import InternVLChatModel
from vllm.transformers_utils.config import get_config

from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.internvl_chat import write_internvl_chat_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl_chat_checkpoint(tmp_path_factory.mktemp("internvl_chat"))


def released(d: int, ff: int, layers: int, text: int, patches: int, qk_norm: bool) -> dict[str, tuple[int, ...]]:
    """What a checkpoint like OpenGVLab/InternVL3-1B or, with `qk_norm`, -38B stores of its encoder and projector."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, d),
        "vision_model.embeddings.position_embedding": (1, 1 + patches, d),
        "vision_model.embeddings.patch_embedding.weight": (d, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (d,),
        "mlp1.0.weight": (4 * d,),
        "mlp1.0.bias": (4 * d,),
        "mlp1.1.weight": (text, 4 * d),
        "mlp1.1.bias": (text,),
        "mlp1.3.weight": (text, text),
        "mlp1.3.bias": (text,),
    }
    layer: dict[str, tuple[int, ...]] = {"attn.qkv.weight": (3 * d, d), "attn.proj.weight": (d, d)}
    layer |= {"attn.proj.bias": (d,), "ls1": (d,), "ls2": (d,), "norm1.weight": (d,), "norm2.weight": (d,)}
    layer |= {"mlp.fc1.weight": (ff, d), "mlp.fc1.bias": (ff,), "mlp.fc2.weight": (d, ff), "mlp.fc2.bias": (d,)}
    if qk_norm:
        layer |= {"attn.q_norm.weight": (d,), "attn.k_norm.weight": (d,)}
    else:
        layer |= {"attn.qkv.bias": (3 * d,), "norm1.bias": (d,), "norm2.bias": (d,)}
    for i in range(layers):
        shapes |= {f"vision_model.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize("qk_norm", [False, True], ids=["1B", "38B"])
def test_names_and_shapes_are_the_released_ones_as_vllm_reads_them(qk_norm: bool, tmp_path: Path) -> None:
    expected = released(d=128, ff=256, layers=4, text=256, patches=64, qk_norm=qk_norm)
    directory = write_internvl_chat_checkpoint(tmp_path, qk_norm=qk_norm, shards=2)
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    written = [(name, tuple(tensor.shape)) for file in files for name, tensor in file.items()]
    assert len(written) == len(dict(written)), "a tensor is in two shards"
    assert {name: shape for name, shape in written if not name.startswith("language_model.")} == expected
    names = [name for name, _ in written]
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} < set(names)
    assert InternVLChatModel.hf_to_vllm_mapper.apply_list(names) == names, "vLLM's modules are called alike"


def in_transformers_layout(tensors: Tensors) -> Tensors:
    """A checkpoint's tensors under the names of transformers' modules."""
    layer = {"attn.proj": "attention.projection_layer", "ls1": "lambda_1", "ls2": "lambda_2"}
    layer |= {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    other = {
        "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
        "vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
        "vision_model.embeddings.patch_embedding": "model.vision_tower.embeddings.patch_embeddings.projection",
        "mlp1.0": "model.multi_modal_projector.layer_norm",
        "mlp1.1": "model.multi_modal_projector.linear_1",
        "mlp1.3": "model.multi_modal_projector.linear_2",
        "language_model.lm_head": "lm_head",
    }
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        if stem.startswith("vision_model.encoder.layers."):
            index, _, part = stem.removeprefix("vision_model.encoder.layers.").partition(".")
            prefix = f"model.vision_tower.encoder.layer.{index}."
            if part == "attn.qkv":
                q, k, v = tensor.chunk(3)
                found |= {f"{prefix}attention.{p}_proj.{kind}": rows for p, rows in (("q", q), ("k", k), ("v", v))}
            else:
                found[prefix + layer[part] + dot + kind] = tensor
        else:
            stem = other.get(stem, stem.replace("language_model.model.", "model.language_model."))
            found[stem + dot + kind] = tensor
    return found


def test_the_weights_are_those_of_transformers_layout(checkpoint: Path, tmp_path: Path) -> None:
    model, loading = InternVLForConditionalGeneration.from_pretrained(
        write_internvl_checkpoint(tmp_path, image_size=112), output_loading_info=True
    )
    assert not any(loading.values()), loading
    expected = model.state_dict()
    found = in_transformers_layout(load_file(checkpoint / "model.safetensors"))
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_seed_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    again = write_internvl_chat_checkpoint(tmp_path / "again")
    assert {file.name for file in again.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name
    other = write_internvl_chat_checkpoint(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (checkpoint / "model.safetensors").read_bytes()


def test_vllm_reads_the_configuration_by_the_code_in_the_checkpoint(tmp_path: Path) -> None:
    directory = write_internvl_chat_checkpoint(tmp_path, size="1b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors"))
    config: Any = get_config(str(directory), trust_remote_code=True)
    assert config.model_type == "internvl_chat"
    assert config.dtype == torch.bfloat16
    assert (config.force_image_size, config.vision_config.image_size, config.downsample_ratio) == (448, 448, 0.5)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    text = config.get_text_config()
    assert (text.model_type, text.hidden_size, text.num_hidden_layers) == ("qwen2", 896, 24)


def test_a_prompt_says_image_in_plain_text(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode("<image>")) > 1
    ids = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"] for token in ids if token["special"]}
    assert {"<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>"} <= special

"""Checkpoints of released size: vLLM's vision encoder takes each of their tensors once.

Nothing is held in memory: vLLM's model and the tensors are on the meta device. `test_families.py` compares names and
shapes with released ones.
"""

from __future__ import annotations

import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.plugins import load_general_plugins

from tests.support.samples import fifth
from vllm_vtprune.plugin import vision
from vllm_vtprune.plugin.compat import loading
from vllm_vtprune.plugin.family import in_language_model
from vllm_vtprune_checkpoints import FAMILIES
from vllm_vtprune_checkpoints.writing import Checkpoint, Writer, released

NONE, CLIP = "^$", r"\.layers\.23\.|\.post_layernorm\."
RELEASED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("4b", NONE, {}),
    "gemma4": ("e2b", NONE, {}),
    "gemma4 as a large one": ("e2b", NONE, {"large": True}),
    "glm4v": ("released", NONE, {}),
    "glm4v with experts": ("released", NONE, {"moe": True}),
    "idefics3": ("2b", NONE, {}),
    "internvl": ("1b", NONE, {}),
    "internvl with norms of keys": ("1b", NONE, {"qk_norm": True}),
    "internvl_chat": ("1b", NONE, {}),
    "llava": ("7b", CLIP, {}),
    "llava_next": ("7b", CLIP, {}),
    "llava_onevision": ("0.5b", r"\.post_layernorm\.", {}),
    "mistral3": ("24b", NONE, {}),
    "qwen2_5_vl": ("3b", NONE, {}),
    "qwen3_5": ("9b", NONE, {}),
    "qwen3_vl": ("4b", NONE, {}),
    "qwen3_vl with experts": ("30b-a3b", NONE, {}),
}
"""The size with released shapes, a regular expression of the names that vLLM leaves out, and options of the maker."""


def test_every_family_is_here() -> None:
    assert {name.split()[0] for name in RELEASED} == set(FAMILIES)


@pytest.mark.parametrize("name", fifth(RELEASED))
def test_vllm_consumes_each_released_tensor_once(name: str, tmp_path: Path) -> None:
    """Each parameter of vLLM's model is filled: its loaders compare shapes."""
    load_general_plugins()
    family, (size, unread, options) = name.split()[0], RELEASED[name]
    writer: Writer = getattr(import_module(f"vllm_vtprune_checkpoints.{family}"), f"write_{family}_checkpoint")
    directory = writer(tmp_path, size=size, weights=False, **options)
    engine: dict[str, Any] = dict(dtype="bfloat16", max_model_len=1024, trust_remote_code=True)
    config = vision._encoder_only(EngineArgs(model=str(directory), **engine).create_model_config(), torch.device("cpu"))
    tensors = released_tensors(writer.make(size, **options))
    with set_current_vllm_config(config), loading.private_rotary_embeddings():
        vision._init_single_process_group()
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
            vision._remove_heads(model)
            loaded = model.load_weights([(tensor, torch.empty(shape)) for tensor, shape in tensors.items()])
    buffers = {buffer: values for buffer, values in model.named_buffers() if buffer in loaded}  # others are computed
    held = dict(model.named_parameters()) | buffers
    assert loaded == held.keys()
    read = sum(math.prod(shape) for tensor, shape in tensors.items() if not re.search(unread, tensor))
    assert read == sum(map(torch.numel, held.values()))


def released_tensors(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes in files, but for the language model."""
    tensors: dict[str, tuple[int, ...]] = {}
    for tensor, shape in checkpoint.shapes().items():
        if not in_language_model(tensor):
            name = released(tensor, checkpoint.names)
            joined = tensors.get(name, (0,))[0]
            tensors[name] = (joined + shape[0], *shape[1:]) if shape else shape
    return tensors

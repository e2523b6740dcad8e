"""Released checkpoints, by the names and shapes of all their tensors: vLLM's encoder takes each of them once.

Nothing is held in memory: vLLM's model and the tensors are on the meta device.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.plugins import load_general_plugins

from vllm_vtprune.plugin import vision
from vllm_vtprune.plugin.compat import loading
from vllm_vtprune.plugin.family import in_language_model
from vllm_vtprune.token_table import NAMES
from vllm_vtprune_checkpoints import FAMILIES, write_checkpoint
from vllm_vtprune_checkpoints.writing import released

Shapes = Mapping[str, tuple[int, ...]]


def linear(name: str, into: int, out: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.{kind}": (width,) for kind in ("weight", "bias")[: 1 + bias]}


def layers(prefix: str, count: int, *parts: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for part in parts for name, shape in part.items()}


def projector(into: int, text: int) -> Shapes:
    name = "multi_modal_projector"
    return linear(f"{name}.linear_1", into, text) | linear(f"{name}.linear_2", text, text)


def clip(text: int) -> Shapes:
    """LLaVA-1.5 and LLaVA-NeXT: CLIP-L/336 and the connector."""
    d, ff, tower = 1024, 4096, "vision_tower.vision_model"
    attention = [linear(f"self_attn.{part}_proj", d, d) for part in ("q", "k", "v", "out")]
    mlp = [linear("mlp.fc1", d, ff), linear("mlp.fc2", ff, d)]
    return {
        f"{tower}.embeddings.class_embedding": (d,),
        f"{tower}.embeddings.patch_embedding.weight": (d, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": (577, d),
        **norm(f"{tower}.pre_layrnorm", d),
        **norm(f"{tower}.post_layernorm", d),
        **layers(f"{tower}.encoder.layers", 24, norm("layer_norm1", d), norm("layer_norm2", d), *attention, *mlp),
        **projector(d, text),
    }


def internvit(text: int, *, qk_norm: bool) -> Shapes:
    """InternVL3 in transformers' layout; its largest encoder has norms of queries and keys, and fewer biases."""
    d, ff, tower = 1024, 4096, "vision_tower"
    attention = [linear(f"attention.{part}_proj", d, d, bias=not qk_norm) for part in ("q", "k", "v")]
    attention += [norm(f"attention.{part}_norm", d, bias=False) for part in ("q", "k") if qk_norm]
    norms = [norm(f"layernorm_{place}", d, bias=not qk_norm) for place in ("before", "after")]
    rest = [linear("attention.projection_layer", d, d), linear("mlp.fc1", d, ff), linear("mlp.fc2", ff, d)]
    return {
        f"{tower}.embeddings.cls_token": (1, 1, d),
        f"{tower}.embeddings.position_embeddings": (1, 1025, d),
        f"{tower}.embeddings.patch_embeddings.projection.weight": (d, 3, 14, 14),
        f"{tower}.embeddings.patch_embeddings.projection.bias": (d,),
        **layers(f"{tower}.encoder.layer", 24, {"lambda_1": (d,), "lambda_2": (d,)}, *attention, *norms, *rest),
        **norm("multi_modal_projector.layer_norm", 4 * d),
        **projector(4 * d, text),
    }


def smolvlm(text: int) -> Shapes:
    """SmolVLM: SigLIP-so400m/384 and the connector."""
    d, ff, tower = 1152, 4304, "model.vision_model"
    attention = [linear(f"self_attn.{part}_proj", d, d) for part in ("q", "k", "v", "out")]
    mlp = [linear("mlp.fc1", d, ff), linear("mlp.fc2", ff, d)]
    return {
        f"{tower}.embeddings.patch_embedding.weight": (d, 3, 14, 14),
        f"{tower}.embeddings.patch_embedding.bias": (d,),
        f"{tower}.embeddings.position_embedding.weight": (27 * 27, d),
        **norm(f"{tower}.post_layernorm", d),
        **layers(f"{tower}.encoder.layers", 27, norm("layer_norm1", d), norm("layer_norm2", d), *attention, *mlp),
        **linear("model.connector.modality_projection.proj", 9 * d, text, bias=False),
    }


def qwen2_5(text: int) -> Shapes:
    d, ff, merged = 1280, 3420, 5120
    mlp = [linear(f"mlp.{part}_proj", d, ff) for part in ("gate", "up")] + [linear("mlp.down_proj", ff, d)]
    norms = [norm(f"norm{i}", d, bias=False) for i in (1, 2)]
    return {
        "visual.patch_embed.proj.weight": (d, 3, 2, 14, 14),
        **layers("visual.blocks", 32, *norms, linear("attn.qkv", d, 3 * d), linear("attn.proj", d, d), *mlp),
        **norm("visual.merger.ln_q", d, bias=False),
        **linear("visual.merger.mlp.0", merged, merged),
        **linear("visual.merger.mlp.2", merged, text),
    }


def qwen3(text: int) -> Shapes:
    d, ff, merged, visual = 1024, 4096, 4096, "model.visual"
    attention = [linear("attn.qkv", d, 3 * d), linear("attn.proj", d, d)]
    mlp = [linear("mlp.linear_fc1", d, ff), linear("mlp.linear_fc2", ff, d)]
    merger = {**linear("linear_fc1", merged, merged), **linear("linear_fc2", merged, text)}
    return {
        f"{visual}.patch_embed.proj.weight": (d, 3, 2, 16, 16),
        f"{visual}.patch_embed.proj.bias": (d,),
        f"{visual}.pos_embed.weight": (48 * 48, d),
        **layers(f"{visual}.blocks", 24, norm("norm1", d), norm("norm2", d), *attention, *mlp),
        **{f"{visual}.merger.{name}": shape for name, shape in (norm("norm", d) | merger).items()},
        **layers(f"{visual}.deepstack_merger_list", 3, norm("norm", merged), merger),
    }


@dataclass(frozen=True)
class Row:
    """A released checkpoint.

    Attributes:
        size: of our checkpoint that has its config.
        tensors: beside those of its language model.
        table: name of the table of embeddings.
        unread: a regular expression of the names that vLLM leaves out.
        in_memory: whether vLLM also reads it as transformers 5 has it in memory.
        options: of the maker of ours.
    """

    size: str
    tensors: Shapes
    table: str
    unread: str = "^$"
    in_memory: bool = True
    options: dict[str, Any] = field(default_factory=dict)


INSIDE, CLIP_UNREAD = "language_model.model.embed_tokens.weight", r"\.layers\.23\.|\.post_layernorm\."
ROWS = {
    "llava": Row("7b", clip(4096), INSIDE, CLIP_UNREAD, in_memory=False),
    "llava_next": Row("7b", clip(4096) | {"image_newline": (4096,)}, INSIDE, CLIP_UNREAD, in_memory=False),
    "internvl": Row("1b", internvit(896, qk_norm=False), INSIDE),
    "internvl with norms of keys": Row("1b", internvit(896, qk_norm=True), INSIDE, options={"qk_norm": True}),
    "idefics3": Row("2b", smolvlm(2048), "model.text_model.embed_tokens.weight"),
    "qwen2_5_vl": Row("3b", qwen2_5(2048), "model.embed_tokens.weight"),
    "qwen3_vl": Row("4b", qwen3(2560), "model.language_model.embed_tokens.weight"),
}


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_general_plugins()


@pytest.fixture(scope="module", params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def row(name: str) -> Row:
    return ROWS[name]


def write(name: str, directory: Path, **options: Any) -> Path:
    return write_checkpoint(name.split()[0], directory, **ROWS[name].options, **options)


@pytest.fixture(scope="module")
def model_config(name: str, row: Row, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = write(name, tmp_path_factory.mktemp("released"), size=row.size, weights=False)
    return EngineArgs(model=str(directory), dtype="bfloat16", max_model_len=1024).create_model_config()


@pytest.fixture(scope="module")
def in_memory(model_config: Any) -> Shapes:
    """What transformers has beside the language model."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config.hf_config)
    return {name: tuple(its.shape) for name, its in model.named_parameters() if not in_language_model(name)}


def assert_consumed_once(model_config: Any, tensors: Shapes, unread: str) -> None:
    """By vLLM's model, each parameter of which they fill: its loaders compare shapes."""
    config = vision._encoder_only(model_config, torch.device("cpu"))
    with set_current_vllm_config(config), loading.private_rotary_embeddings():
        vision._init_single_process_group()
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
            vision._remove_heads(model)
            loaded = model.load_weights([(name, torch.empty(shape)) for name, shape in tensors.items()])
    parameters = dict(model.named_parameters())
    held = parameters | {name: its for name, its in model.named_buffers() if name in loaded}  # the others are computed
    assert loaded == held.keys()
    read = sum(math.prod(shape) for name, shape in tensors.items() if not re.search(unread, name))
    assert read == sum(map(torch.numel, held.values()))


def test_vllm_consumes_the_released_tensors_once(row: Row, model_config: Any) -> None:
    text = model_config.hf_text_config
    table = {row.table: (text.vocab_size, text.hidden_size)}
    assert row.table.endswith(NAMES)
    assert_consumed_once(model_config, {**row.tensors, **table}, f"{row.unread}|{re.escape(row.table)}")


def test_vllm_consumes_what_transformers_has_in_memory(row: Row, model_config: Any, in_memory: Shapes) -> None:
    if row.in_memory:
        assert_consumed_once(model_config, in_memory, row.unread)
    else:
        with pytest.raises(ValueError, match="no module or parameter named"):
            assert_consumed_once(model_config, in_memory, row.unread)


def test_the_list_is_all_that_transformers_has(row: Row, in_memory: Shapes) -> None:
    assert Counter(row.tensors.values()) == Counter(in_memory.values())


def test_our_checkpoint_is_called_as_the_released_one(name: str, row: Row, tmp_path: Path) -> None:
    with safe_open(write(name, tmp_path) / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert row.table in names
    language_model = re.compile(r"(model\.)?(language_model|text_model|embed_tokens|layers|norm|lm_head)\.")
    vision_names = {name for name in names if not language_model.match(name)}
    assert numberless(vision_names) == numberless(row.tensors.keys())


RELEASED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("4b", "^$", {}),
    "gemma4": ("e2b", "^$", {}),
    "gemma4 as a large one": ("e2b", "^$", {"large": True}),
    "glm4v": ("released", "^$", {}),
    "glm4v with experts": ("released", "^$", {"moe": True}),
    "internvl_chat": ("1b", "^$", {}),
    "llava_onevision": ("0.5b", r"\.post_layernorm\.", {}),
    "mistral3": ("24b", "^$", {}),
    "qwen3_5": ("9b", "^$", {}),
    "qwen3_vl with experts": ("30b-a3b", "^$", {}),
}
"""Of other families: the size with released shapes, the names that vLLM leaves out, and options of the maker."""


def test_every_family_is_here() -> None:
    assert {name.split()[0] for name in (*ROWS, *RELEASED)} == set(FAMILIES)


@pytest.mark.parametrize("name", RELEASED)
def test_vllm_consumes_each_released_tensor_once(name: str, tmp_path: Path) -> None:
    """Its names are the maker's, which takes shapes from transformers."""
    family, (size, unread, options) = name.split()[0], RELEASED[name]
    directory = write_checkpoint(family, tmp_path, size=size, weights=False, **options)
    engine: dict[str, Any] = dict(dtype="bfloat16", max_model_len=1024, trust_remote_code=True)
    model_config = EngineArgs(model=str(directory), **engine).create_model_config()
    writer = getattr(import_module(f"vllm_vtprune_checkpoints.{family}"), f"write_{family}_checkpoint")
    checkpoint = writer.make(size, **options)
    tensors: dict[str, tuple[int, ...]] = {}
    for tensor, shape in checkpoint.shapes().items():
        if not in_language_model(tensor):
            known = tensors.get(released(tensor, checkpoint.names))  # of those that are joined
            tensors[released(tensor, checkpoint.names)] = shape if known is None else (known[0] + shape[0], *shape[1:])
    assert_consumed_once(model_config, tensors, unread)


def numberless(names: Collection[str]) -> set[str]:
    """Checkpoints have layers in other numbers."""
    return {re.sub(r"\.\d+\.", ".N.", name) for name in names}

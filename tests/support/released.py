"""Layouts of released checkpoints: names and shapes of tensors, and files that hold them without taking space."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]

Scheme = tuple[tuple[str, str], ...]
"""Of names: the prefixes of the modules of transformers 5 and those of the files. What has none is called alike."""


def under(scheme: Scheme, released: Scheme, name: str) -> str:
    """The name under a scheme of the tensor that is called `name` under the released one."""
    module = next((old + name.removeprefix(new) for old, new in released if name.startswith(new)), name)
    return next((new + module.removeprefix(old) for old, new in scheme if module.startswith(old)), module)


def released_clip(text: int = 4096, vocabulary: int = 32064) -> dict[str, tuple[int, ...]]:
    """What LLaVA-1.5 and LLaVA-NeXT checkpoints store of CLIP-L/336, the projector and the token table."""
    d, ff = 1024, 4096
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.vision_model.embeddings.class_embedding": (d,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (d, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (577, d),
        "multi_modal_projector.linear_1.weight": (text, d),
        "multi_modal_projector.linear_1.bias": (text,),
        "multi_modal_projector.linear_2.weight": (text, text),
        "multi_modal_projector.linear_2.bias": (text,),
        "language_model.model.embed_tokens.weight": (vocabulary, text),
    }
    vectors = {f"layer_norm{i}.{kind}": (d,) for i in (1, 2) for kind in ("weight", "bias")}
    matrices = {f"self_attn.{p}_proj.weight": (d, d) for p in ("q", "k", "v", "out")}
    biases = {f"self_attn.{p}_proj.bias": (d,) for p in ("q", "k", "v", "out")}
    mlp = {"mlp.fc1.weight": (ff, d), "mlp.fc1.bias": (ff,), "mlp.fc2.weight": (d, ff), "mlp.fc2.bias": (d,)}
    for i in range(24):
        for name, shape in (vectors | matrices | biases | mlp).items():
            shapes[f"vision_tower.vision_model.encoder.layers.{i}.{name}"] = shape
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_tower.vision_model.{norm}.{kind}": (d,) for kind in ("weight", "bias")}
    return shapes


def write_sparse_shards(directory: Path, shapes: Shapes, shards: int) -> None:
    """Safetensors files of zeros, and their index. They take no space on disk: each is a header and a hole."""
    weight_map = {name: f"model-{1 + i % shards}.safetensors" for i, name in enumerate(shapes)}
    for file in set(weight_map.values()):
        _write_sparse(directory / file, {n: s for n, s in shapes.items() if weight_map[n] == file})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_sparse(path: Path, shapes: Shapes) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + 2 * prod(shape)]}
        offset += 2 * prod(shape)
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)

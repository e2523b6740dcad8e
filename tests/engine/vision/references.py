"""Every family in plain transformers: a tiny checkpoint, and what transformers compute of some pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.support.processors import config_of
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plugin.vision import Encoder
from vllm_vtprune_checkpoints import write_checkpoint
from vllm_vtprune_evaluation.photo import photograph

CLOSE = dict(rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Row:
    """A family in transformers.

    Attributes:
        connector: path of the module whose output embeddings are.
        attention: paths of the encoder's first attention, and of that whose output is read, of one with a CLS token.
        options: of the function that writes its tiny checkpoint.
        preprocessing: options that transformers' processor gives its image processor.
        features: path of the module that is given what feeds the connector, if that is another.
        patches: of the arguments of that module, ``(M, k, d_v)`` the k patches of each row of embeddings.
        stored: name of the connector in files; as in transformers, but for ``model.``, where it is None.
        twin: the family as which transformers reads the same weights, if it does not as this one.
    """

    connector: str
    attention: tuple[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    features: str | None = None
    patches: Callable[..., Tensor] | None = None
    stored: str | None = None
    twin: str | None = None

    @property
    def file_name(self) -> str:
        return self.stored or self.connector.removeprefix("model.")


def clip(last: int = 2, **options: Any) -> Row:
    layers = "model.vision_tower.encoder.layers"
    return Row("model.multi_modal_projector", (f"{layers}.0.self_attn", f"{layers}.{last}.self_attn"), options)


def internvit(**options: Any) -> Row:
    layers = "model.vision_tower.encoder.layer"
    return Row("model.multi_modal_projector", (f"{layers}.0.attention", f"{layers}.3.attention"), options)


def blocks(squares: Tensor, across: int, columns: int | None = None) -> Tensor:
    """(S, n, ...) -> (S * n / across^2, across^2, ...): the patches of each token, as they lie in their square.

    Args:
        columns: of patches, where they form no square.
    """
    columns = columns or isqrt(squares.shape[1])
    patch = torch.arange(squares.shape[1]).view(-1, columns)
    tokens = [
        patch[row : row + across, column : column + across].flatten()
        for row in range(0, len(patch), across)
        for column in range(0, columns, across)
    ]
    return squares[:, torch.stack(tokens)].flatten(0, 1)


def of_convolution(squares: Tensor) -> Tensor:
    """GLM-4V: (M, d_v, 2, 2) -> (M, 4, d_v)."""
    return squares.flatten(2).transpose(1, 2)


def of_shuffle(squares: Tensor) -> Tensor:
    """Idefics3: (S, t, 4 d_v) -> (S * t, 4, d_v)."""
    return squares.flatten(0, 1).unflatten(1, (4, -1))


def of_one_image(patches: Tensor, sizes: Any) -> Tensor:
    """Mistral 3: (h * w, d_v) in raster order -> (h * w / 4, 4, d_v), for patches of 14 pixels."""
    [(height, width)] = [(int(height) // 14, int(width) // 14) for height, width in sizes]
    return blocks(patches.view(1, height * width, -1), 2, width)


GLM4V = Row("model.visual.merger", features="model.visual.downsample", patches=of_convolution)


ROWS = {
    "llava": clip(),
    "llava with SigLIP": Row("model.multi_modal_projector", options={"siglip": True}),
    "llava_next": clip(image_size=112),
    "llava_onevision": Row("model.multi_modal_projector"),
    "internvl": internvit(image_size=112),
    "internvl with norms of keys": internvit(image_size=112, qk_norm=True),
    "internvl_chat": replace(internvit(), stored="mlp1", twin="internvl"),
    "gemma3": Row("model.multi_modal_projector", patches=partial(blocks, across=4)),
    "gemma4": Row("model.embed_vision", features="model.embed_vision.embedding_pre_projection_norm"),
    "gemma4 large": Row(
        "model.embed_vision", features="model.embed_vision.embedding_pre_projection_norm", options={"large": True}
    ),
    "glm4v": GLM4V,
    "glm4v with experts": replace(GLM4V, options={"moe": True}),
    "idefics3": Row("model.connector", features="model.connector.modality_projection", patches=of_shuffle),
    "mistral3": Row("model.multi_modal_projector", patches=of_one_image, preprocessing={"patch_size": 28}),
    "qwen2_5_vl": Row("model.visual.merger"),
    "qwen3_vl": Row("model.visual.merger"),
    "qwen3_vl with experts": Row("model.visual.merger", options={"size": "tiny-moe"}),
    "qwen3_5": Row("model.visual.merger"),
    "qwen3_5 with experts": Row("model.visual.merger", options={"size": "tiny-moe"}),
}


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [
    *(photograph().resize(size) for size in ((300, 200), (120, 400), (64, 64), (500, 500), (500, 90))),
    *(noise(*size) for size in ((4, 300), (300, 4))),  # of which a canvas keeps no row, or no column
]


def write(family: str, directory: Path, **options: Any) -> Path:
    return write_checkpoint(family.split()[0], directory, **ROWS[family].options, **options)


def encoder_of(directory: Path, **options: Any) -> Encoder:
    config = config_of(directory, **options)
    return Encoder(MULTIMODAL_REGISTRY.create_processor(config).family, config, torch.device("cpu"))


@dataclass(frozen=True)
class Reference:
    """What transformers compute of one image.

    Attributes:
        rows: ``(T, d)`` what the language model reads of it.
        deepstack: ``(T, p)`` what its deeper layers read.
        inputs, outputs: of the connector, (M, k, d_v) of k patches and (M, d).
        attention: ``(S, n)`` from the CLS token of S squares to their patches, of the first layer and the one read.
        keys: ``(S, n, d_k)`` of the latter, mean over heads.
    """

    rows: Tensor
    deepstack: Tensor | None
    inputs: Tensor
    outputs: Tensor
    attention: list[Tensor]
    keys: Tensor | None

    def sources(self, features: VisualFeatures) -> Tensor:
        """``(N,)`` for each token the row of the connector's output that it equals."""
        return torch.cdist(features.embeds, self.outputs).argmin(dim=1)


def loaded(directory: Path) -> Any:
    model, loading = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


def image_features(
    model: Any, row: Row, directory: Path, picture: Image.Image, pixels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(T, d)`` and ``(T, p)``, with transformers' own preprocessing; `pixels`: in place of it."""
    inputs = {"pixel_values": pixels}
    if pixels is None:
        process = AutoImageProcessor.from_pretrained(directory)
        inputs = process(images=picture, return_tensors="pt", **row.preprocessing)
    taken = inspect.signature(model.get_image_features).parameters.keys() & inputs.keys()
    out = model.get_image_features(**{name: inputs[name] for name in taken})
    planes = [torch.cat(list(plane)) for plane in getattr(out, "deepstack_features", None) or ()]
    return torch.cat(list(out.pooler_output)), torch.cat(planes, dim=1) if planes else None


def references_of(model: Any, row: Row, directory: Path, images: Sequence[PreparedImage]) -> list[Reference]:
    """Of each of `PICTURES`; a twin's processor scales them otherwise."""
    layers = getattr(model.config, "vision_feature_layer", -1)
    width = model.config.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1)
    seen: dict[str, Any] = {}

    def note(name: str, path: str) -> None:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda _, arguments, out: seen.update({name: (arguments, out)}))

    note("connector", row.connector)
    note("features", row.features or row.connector)
    for path in row.attention or ():
        note(path, path)
    if row.attention is not None:
        attention = model.get_submodule(row.attention[1])
        note("keys", f"{row.attention[1]}.{'k_norm' if hasattr(attention, 'k_norm') else 'k_proj'}")

    def reference(picture: Image.Image, image: PreparedImage) -> Reference:
        pixels = None if row.twin is None else squares_of(image)
        rows, deepstack = image_features(model, row, directory, picture, pixels)
        outputs = seen["connector"][1].flatten(0, -2)
        arguments = seen["features"][0]
        inputs = arguments[0].reshape(len(outputs), -1, width) if row.patches is None else row.patches(*arguments)
        return Reference(
            rows,
            deepstack,
            inputs,
            outputs,
            [seen[path][1][1][:, :, 0, 1:].mean(dim=1) for path in row.attention or ()],
            seen["keys"][1][:, 1:].unflatten(-1, (attention.num_heads, -1)).mean(dim=2) if row.attention else None,
        )

    with torch.inference_mode():
        return [reference(picture, image) for picture, image in zip(PICTURES, images, strict=True)]


def squares_of(image: PreparedImage) -> Tensor:
    """(S, 3, H, W)"""
    [pixels] = [value.data for name, value in image.item.items() if name.startswith("pixel_values")]
    return pixels

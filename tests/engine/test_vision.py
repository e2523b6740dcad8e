"""vLLM's own encoder, built in a process without an engine: what it gives is what plain transformers give.

Of each family a tiny checkpoint, and images of several shapes through the processor that a server has. What a token is
made from is told by its value: the row of the connector's output that it equals.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import isqrt, prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.plugins import load_general_plugins

from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune.families import FAMILIES
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plugin import reading
from vllm_vtprune.plugin.family import DynamicResolution, in_language_model
from vllm_vtprune.plugin.image import encode_image, preprocess, warm_up
from vllm_vtprune.plugin.vision import Encoder
from vllm_vtprune.selectors.registry import METHODS, SELECTORS
from vllm_vtprune.sequence import sequence, sequence_length
from vllm_vtprune.tower import TowerError
from vllm_vtprune_checkpoints import write_checkpoint
from vllm_vtprune_evaluation.photo import photograph

CPU = torch.device("cpu")
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


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_general_plugins()


def write(family: str, directory: Path, **options: Any) -> Path:
    return write_checkpoint(family.split()[0], directory, **ROWS[family].options, **options)


def config_of(directory: Path, **options: Any) -> Any:
    options = {"dtype": "float32", "max_model_len": 1024, "trust_remote_code": True, **options}
    return EngineArgs(model=str(directory), **options).create_model_config()


def encoder_of(directory: Path, **options: Any) -> Encoder:
    config = config_of(directory, **options)
    return Encoder(MULTIMODAL_REGISTRY.create_processor(config).family, config, CPU)


@pytest.fixture(scope="module", params=ROWS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def row(family: str) -> Row:
    return ROWS[family]


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(family, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def model_config(checkpoint: Path) -> Any:
    return config_of(checkpoint)


@pytest.fixture(scope="module")
def processor(model_config: Any) -> Any:
    return MULTIMODAL_REGISTRY.create_processor(model_config)


@pytest.fixture(scope="module")
def tower(processor: Any) -> Any:
    return processor.runtime.local.tower


@pytest.fixture(scope="module")
def images(processor: Any) -> list[PreparedImage]:
    return [preprocess(processor, picture) for picture in PICTURES]


@pytest.fixture(scope="module")
def found(tower: Any, images: list[PreparedImage]) -> list[VisualFeatures]:
    return [features for image in images for features in tower.encode([image])]


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


@pytest.fixture(scope="module")
def readable(row: Row, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as transformers read it."""
    return checkpoint if row.twin is None else write(row.twin, tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="module")
def model(readable: Path) -> Any:
    return loaded(readable)


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


@pytest.fixture(scope="module")
def references(model: Any, row: Row, readable: Path, images: Sequence[PreparedImage]) -> list[Reference]:
    return references_of(model, row, readable, images)


def references_of(model: Any, row: Row, directory: Path, images: Sequence[PreparedImage]) -> list[Reference]:
    """Of each of `PICTURES`; a twin's processor scales them otherwise."""
    layers = getattr(model.config, "vision_feature_layer", -1)
    width = model.config.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1)
    seen: dict[str, Any] = {}

    def note(name: str, path: str) -> None:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda _, given, out: seen.update({name: (given, out)}))

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
        given = seen["features"][0]
        inputs = given[0].reshape(len(outputs), -1, width) if row.patches is None else row.patches(*given)
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
    [pixels] = [its.data for name, its in image.item.items() if name.startswith("pixel_values")]
    return pixels


def everything(features: VisualFeatures) -> Any:
    return SimpleNamespace(kept=torch.arange(features.num_tokens), embeds=features.embeds)


def test_every_family_is_here() -> None:
    assert {name.split()[0] for name in ROWS} == set(FAMILIES)


def test_what_the_language_model_reads(
    found: Sequence[VisualFeatures], references: Sequence[Reference], model: Any
) -> None:
    newline = getattr(model.model, "image_newline", None)
    for features, expected in zip(found, references, strict=True):
        is_token = torch.ones(len(expected.rows), dtype=torch.bool)
        if newline is not None:
            is_token = (expected.rows != newline).any(dim=1)
        if is_token.all():
            assert features.newline is None
        else:
            assert torch.equal(features.newline, newline)
        torch.testing.assert_close(features.embeds, expected.rows[is_token], **CLOSE)
        if expected.deepstack is None:
            assert features.deepstack is None
            torch.testing.assert_close(sequence(features, everything(features)), expected.rows, **CLOSE)
            assert sequence_length(features) == len(expected.rows)
        else:
            torch.testing.assert_close(features.deepstack, expected.deepstack, **CLOSE)


def test_what_feeds_the_connector_belongs_to_its_token(
    found: Sequence[VisualFeatures], references: Sequence[Reference], images: Sequence[PreparedImage]
) -> None:
    """Where tokens are scaled, `tests/engine/test_layouts.py` has it."""
    for features, expected, image in zip(found, references, images, strict=True):
        if image.layout.connector_canvas is not None:
            continue
        sources = expected.sources(features)
        assert len(sources.unique()) == features.num_tokens
        torch.testing.assert_close(features.embeds, expected.outputs[sources], **CLOSE)
        torch.testing.assert_close(features.encoder, expected.inputs.mean(dim=1)[sources], **CLOSE)


def test_attention_and_keys(
    found: Sequence[VisualFeatures], references: Sequence[Reference], row: Row, processor: Any
) -> None:
    across = processor.family.merge(processor.info.get_hf_config())
    provided = {"cls_attention", "keys"} & processor.family.provides
    assert provided == ({"cls_attention", "keys"} if row.attention else set())
    for features, expected in zip(found, references, strict=True):
        if not row.attention:
            assert features.cls_attention is features.overview_attention is features.keys is None
            continue
        sources = expected.sources(features)
        early, last = (blocks(seen, across).sum(dim=1) for seen in expected.attention)
        assert last.std() > 0.1 * last.mean(), "a near-uniform map would hide an error"
        torch.testing.assert_close(features.cls_attention, last[sources], rtol=1e-3, atol=1e-6)
        assert expected.keys is not None
        torch.testing.assert_close(features.keys, blocks(expected.keys, across).mean(dim=1)[sources], **CLOSE)
        if features.tiles is None:
            assert features.overview_attention is None
        else:
            overview = sources[features.tiles.ids == features.tiles.overview]
            torch.testing.assert_close(features.overview_attention, early[overview], rtol=1e-3, atol=1e-6)


def test_grids_and_tiles(
    found: Sequence[VisualFeatures], references: Sequence[Reference], images: Sequence[PreparedImage]
) -> None:
    for features, expected, image, picture in zip(found, references, images, PICTURES, strict=True):
        assert [len(positions) for positions, _ in features.planes()] == [prod(grid) for grid in features.grids]
        if features.tiles is None:
            assert features.grid is not None
            rows, columns = features.grid
            assert rows == columns or (rows > columns) == (picture.height > picture.width)
            continue
        assert features.grid is None
        if image.layout.connector_canvas is not None:
            continue
        pixels = squares_of(image)
        squares = expected.sources(features) // (len(expected.outputs) // len(pixels))
        pairs = set(zip(features.tiles.ids.tolist(), squares.tolist(), strict=True))
        assert len(pairs) == len(dict(pairs)) == len({square for _, square in pairs}) == len(features.tiles.grids)
        assert features.tiles.overview is not None
        whole = torch.tensor(np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.float32)).mean(dim=2)
        seen = torch.nn.functional.adaptive_avg_pool2d(pixels.float().mean(dim=1), 8)
        alike = [float(torch.corrcoef(torch.stack([whole.flatten(), its.flatten()]))[0, 1]) for its in seen]
        assert int(np.nanargmax(alike)) == dict(pairs)[features.tiles.overview]


def tensors(features: VisualFeatures) -> dict[str, Tensor]:
    return {name: value for name, value in vars(features).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("most", [300, reading.BATCH_PATCHES])
def test_images_of_one_batch_and_images_alone(
    most: int, tower: Any, images: list[PreparedImage], found: Sequence[VisualFeatures], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_PATCHES", most)
    for together, alone in zip(tower.encode(images[::-1])[::-1], found, strict=True):
        assert tensors(together).keys() == tensors(alone).keys()
        assert (together.grid, together.grids) == (alone.grid, alone.grids)
        for name, tensor in tensors(together).items():
            torch.testing.assert_close(tensor, getattr(alone, name), rtol=1e-5, atol=1e-5)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} shares memory"
            assert not tensor.requires_grad
    assert tower.encode([]) == []


def test_threads_get_their_own_results(
    tower: Any, images: list[PreparedImage], found: Sequence[VisualFeatures]
) -> None:
    def work(index: int) -> None:
        for _ in range(4):
            [features] = tower.encode([images[index]])
            torch.testing.assert_close(features.encoder, found[index].encoder, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(max_workers=3) as threads:
        list(threads.map(work, (0, 2, 4)))


def test_every_method_takes_these_features(processor: Any, found: Sequence[VisualFeatures]) -> None:
    """Also of an image that is so flat or thin that nothing is left but the overview, if the family has one."""
    family = processor.family
    methods = [method for method in SELECTORS if set(METHODS[method].needs) <= family.provides]
    assert "resprune" in methods
    for method in methods:
        policy = PruningPolicy.parse({"method": method, "budget": {"type": "ratio", "keep": 0.3}}).resolve(family)
        for features in (found[0], found[-1]):
            plan = plan_tokens(features, policy, family=family)
            assert 0 < len(plan.kept) <= int(0.3 * features.num_tokens + 0.5)
            newlines = len(sequence(features, plan)) - len(plan.kept)
            assert 0 <= newlines <= (0 if features.newline is None else features.canvas[0])


def test_a_blank_image_can_be_encoded(processor: Any) -> None:
    warm_up(processor)
    assert encode_image(processor, MediaWithBytes(Image.new("RGB", (64, 64)), b"")).num_tokens > 1


def test_the_vision_encoder_is_all_that_is_held(tower: Encoder, model: Any, row: Row, readable: Path) -> None:
    """It has the parameters that transformers' features depend on."""
    rows, deepstack = image_features(model, row, readable, PICTURES[0])
    (rows.sum() + (0 if deepstack is None else deepstack.sum())).backward()
    used = {name: weights for name, weights in model.named_parameters() if weights.grad is not None}
    assert not any(map(in_language_model, used))
    assert tower.num_parameters == sum(weights.numel() for weights in used.values())
    assert tower.nbytes == 4 * tower.num_parameters
    assert tower.weights == "checkpoint"
    model.zero_grad()


def test_rows_are_those_of_the_token_table(tower: Encoder, model: Any) -> None:
    ids = [5, 700, 5]
    assert torch.equal(tower.token_rows(ids), model.get_input_embeddings().weight[ids])


def test_half_precision_stays_close(
    checkpoint: Path, images: list[PreparedImage], found: Sequence[VisualFeatures]
) -> None:
    half = encoder_of(checkpoint, dtype="bfloat16")
    for rounded, exact in zip(half.encode(images[:2]), found, strict=False):
        assert rounded.embeds.dtype == rounded.encoder.dtype == torch.bfloat16
        assert rounded.cls_attention is None or rounded.cls_attention.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(exact.embeds, rounded.embeds.float(), dim=-1).min() > 0.98
    assert half.token_rows([1]).dtype == torch.bfloat16


def test_random_weights_keep_tokens_apart(
    family: str, processor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And are those of the seed; no weights are read."""
    monkeypatch.setenv("VTPRUNE_LOAD_FORMAT", "dummy")
    directory = write(family, tmp_path, weights=False)
    one, same, other = (encoder_of(directory, seed=seed) for seed in (0, 0, 1))
    assert one.weights == "dummy"
    image = preprocess(processor, noise(300, 300))
    first, again, different = (tower.encode([image])[0] for tower in (one, same, other))
    unit = torch.nn.functional.normalize(first.embeds - first.embeds.mean(dim=0), dim=1)
    assert (unit @ unit.T).fill_diagonal_(0).abs().max() < 0.99
    assert torch.equal(first.embeds, again.embeds)
    assert not torch.allclose(first.embeds, different.embeds)
    assert torch.equal(one.token_rows([3]), same.token_rows([3]))
    assert not torch.equal(one.token_rows([3]), other.token_rows([3]))


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
    with pytest.raises(TowerError, match=f"{connector}.*{name.rsplit(connector)[1]}"):
        encoder_of(without)
    _, other = changed(checkpoint, name, lambda weights: weights[:-1])
    with pytest.raises(TowerError, match=name):
        encoder_of(other)


def test_a_part_of_the_attention_that_is_missing(checkpoint: Path) -> None:
    """vLLM has queries, keys and values in one matrix."""
    stored = [name for name in load_file(checkpoint / "model.safetensors") if "vis" in name]
    name = next(name for name in stored if name.endswith(("k_proj.weight", "k_proj.linear.weight", "qkv.weight")))
    _, without = changed(checkpoint, name, lambda _: None)
    with pytest.raises(TowerError, match=re.split("k_proj|qkv", name.removeprefix("model."))[0]):
        encoder_of(without)


def test_another_device_than_vllm_s_is_refused(model_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTPRUNE_DEVICE", "cuda:0")
    with pytest.raises(TowerError, match=r"on the CPU, not on cuda:0; set VTPRUNE_DEVICE to auto"):
        _ = MULTIMODAL_REGISTRY.create_processor(model_config).runtime.local.tower


def test_tokens_are_counted_as_the_image_processor_scales(processor: Any) -> None:
    """And a picture that is scaled down has no more of them than the budget."""
    assert isinstance(processor, DynamicResolution) == ("dynamic_resolution" in processor.family.provides)
    if not isinstance(processor, DynamicResolution):
        return
    for height, width in [(320, 320), (96, 640), (1500, 900), (64, 64), (33, 200)]:
        picture = Image.new("RGB", (width, height), "gray")
        whole = placed(processor, picture)
        assert processor.num_tokens((height, width), {}) == whole
        policy = {"method": "resize", "budget": {"type": "tokens", "keep": 9}}
        assert 1 <= placed(processor, picture, pruning=policy) <= min(9, whole)


def placed(processor: Any, picture: Image.Image, **options: object) -> int:
    items = processor.info.parse_mm_data({"image": [picture]})
    inputs = ProcessorInputs([processor.image_token_id], items, hf_processor_mm_kwargs=options)
    [place] = processor.apply(inputs, TimingContext())["mm_placeholders"]["image"]
    return int(place.get_num_embeds())


@pytest.mark.parametrize(
    ("name", "layers"),
    [("llava", -1), ("llava", 2), ("llava", [-3]), ("llava_next", [-3, -2]), ("llava_next", [1, 3, 2])],
)
def test_other_layers_of_clip(name: str, layers: Any, tmp_path: Path) -> None:
    """What feeds the connector may be another layer than the released one, or several side by side."""
    directory = write(name, tmp_path, feature_layer=layers)
    deepest = max(layer % 5 for layer in ([layers] if isinstance(layers, int) else layers))
    row, model = clip(deepest - 1), loaded(directory)
    processor = MULTIMODAL_REGISTRY.create_processor(config_of(directory))
    images = [preprocess(processor, picture) for picture in PICTURES]
    found, references = processor.runtime.local.tower.encode(images), references_of(model, row, directory, images)
    test_what_the_language_model_reads(found, references, model)
    test_what_feeds_the_connector_belongs_to_its_token(found, references, images)
    test_attention_and_keys(found, references, row, processor)
    test_the_vision_encoder_is_all_that_is_held(processor.runtime.local.tower, model, row, directory)


def test_several_layers_side_by_side_in_llava(tmp_path: Path) -> None:
    """vLLM's class does not have them: it reads one layer, for which the connector of the checkpoint is too wide."""
    with pytest.raises(TowerError, match=r"multi_modal_projector\.linear_1\.weight"):
        encoder_of(write("llava", tmp_path, feature_layer=[-3, -2]))

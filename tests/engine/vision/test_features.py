"""vLLM's own encoder, built in a process without an engine, gives what plain transformers give.

What a token is made from is told by its value: the row of the connector's output that it equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vllm.multimodal.media import MediaWithBytes

from tests.engine.vision.references import (
    CLOSE,
    PICTURES,
    ROWS,
    Reference,
    Row,
    blocks,
    clip,
    encoder_of,
    image_features,
    loaded,
    references_of,
    squares_of,
    write,
)
from tests.support.processors import process_prompt, processor_of
from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune.families import FAMILIES
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plugin import reading
from vllm_vtprune.plugin.family import DynamicResolution, in_language_model
from vllm_vtprune.plugin.image import encode_image, preprocess, warm_up
from vllm_vtprune.plugin.vision import Encoder
from vllm_vtprune.selectors.registry import METHODS, SELECTORS
from vllm_vtprune.sequence import sequence, sequence_length


@pytest.fixture(scope="module")
def encoder(processor: Any) -> Any:
    return processor.runtime.local.vision_encoder


@pytest.fixture(scope="module")
def images(processor: Any) -> list[PreparedImage]:
    return [preprocess(processor, picture) for picture in PICTURES]


@pytest.fixture(scope="module")
def encoded(encoder: Any, images: list[PreparedImage]) -> list[VisualFeatures]:
    return [features for image in images for features in encoder.encode([image])]


@pytest.fixture(scope="module")
def readable(row: Row, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as transformers read it."""
    return checkpoint if row.twin is None else write(row.twin, tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="module")
def model(readable: Path) -> Any:
    return loaded(readable)


@pytest.fixture(scope="module")
def references(model: Any, row: Row, readable: Path, images: Sequence[PreparedImage]) -> list[Reference]:
    return references_of(model, row, readable, images)


def everything(features: VisualFeatures) -> Any:
    return SimpleNamespace(kept=torch.arange(features.num_tokens), embeds=features.embeds)


def test_every_family_is_here() -> None:
    assert {name.split()[0] for name in ROWS} == set(FAMILIES)


def test_what_the_language_model_reads(
    encoded: Sequence[VisualFeatures], references: Sequence[Reference], model: Any
) -> None:
    newline = getattr(model.model, "image_newline", None)
    for features, expected in zip(encoded, references, strict=True):
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
    encoded: Sequence[VisualFeatures], references: Sequence[Reference], images: Sequence[PreparedImage]
) -> None:
    """Where tokens are scaled, `tests/engine/test_layouts.py` has it."""
    for features, expected, image in zip(encoded, references, images, strict=True):
        if image.layout.connector_canvas is not None:
            continue
        sources = expected.sources(features)
        assert len(sources.unique()) == features.num_tokens
        torch.testing.assert_close(features.embeds, expected.outputs[sources], **CLOSE)
        torch.testing.assert_close(features.encoder, expected.inputs.mean(dim=1)[sources], **CLOSE)


def test_attention_and_keys(
    encoded: Sequence[VisualFeatures], references: Sequence[Reference], row: Row, processor: Any
) -> None:
    across = processor.family.merge(processor.info.get_hf_config())
    provided = {"cls_attention", "keys"} & processor.family.provides
    assert provided == ({"cls_attention", "keys"} if row.attention else set())
    for features, expected in zip(encoded, references, strict=True):
        if not row.attention:
            assert features.cls_attention is features.overview_attention is features.keys is None
            continue
        sources = expected.sources(features)
        early, last = (blocks(seen, across).sum(dim=1) for seen in expected.attention)
        assert last.std() > 0.1 * last.mean(), "a near-uniform map would hide an error"
        torch.testing.assert_close(features.cls_attention, last[sources], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(features.keys, blocks(expected.keys, across).mean(dim=1)[sources], **CLOSE)
        if features.tiles is None:
            assert features.overview_attention is None
        else:
            overview = sources[features.tiles.ids == features.tiles.overview]
            torch.testing.assert_close(features.overview_attention, early[overview], rtol=1e-3, atol=1e-6)


def test_grids_and_tiles(
    encoded: Sequence[VisualFeatures], references: Sequence[Reference], images: Sequence[PreparedImage]
) -> None:
    for features, expected, image, picture in zip(encoded, references, images, PICTURES, strict=True):
        assert [len(positions) for positions, _ in features.planes()] == [prod(grid) for grid in features.grids]
        if features.tiles is None:
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
        whole = torch.tensor(np.asarray(picture.resize((8, 8), Image.Resampling.BOX), dtype=np.float32)).mean(dim=2)
        seen = torch.nn.functional.adaptive_avg_pool2d(pixels.float().mean(dim=1), 8)
        alike = [float(torch.corrcoef(torch.stack([whole.flatten(), tile.flatten()]))[0, 1]) for tile in seen]
        assert int(np.nanargmax(alike)) == dict(pairs)[features.tiles.overview]


def tensors(features: VisualFeatures) -> dict[str, Tensor]:
    return {name: value for name, value in vars(features).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("most", [300, reading.BATCH_PATCHES])
def test_images_of_one_batch_and_images_alone(
    most: int,
    encoder: Any,
    images: list[PreparedImage],
    encoded: Sequence[VisualFeatures],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "BATCH_PATCHES", most)
    for together, alone in zip(encoder.encode(images[::-1])[::-1], encoded, strict=True):
        assert tensors(together).keys() == tensors(alone).keys()
        assert (together.grid, together.grids) == (alone.grid, alone.grids)
        for name, tensor in tensors(together).items():
            torch.testing.assert_close(tensor, getattr(alone, name), rtol=1e-5, atol=1e-5)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} shares memory"
            assert not tensor.requires_grad
    assert encoder.encode([]) == []


def test_threads_get_their_own_results(
    encoder: Any, images: list[PreparedImage], encoded: Sequence[VisualFeatures]
) -> None:
    def work(index: int) -> None:
        for _ in range(2):
            [features] = encoder.encode([images[index]])
            torch.testing.assert_close(features.encoder, encoded[index].encoder, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(max_workers=3) as threads:
        list(threads.map(work, (0, 2, 4)))


def test_every_method_takes_these_features(processor: Any, encoded: Sequence[VisualFeatures]) -> None:
    """Also of an image that is so flat or thin that nothing is left but the overview, if the family has one."""
    family = processor.family
    methods = [method for method in SELECTORS if set(METHODS[method].needs) <= family.provides]
    assert "resprune" in methods
    for method in methods:
        policy = PruningPolicy.parse({"method": method, "budget": {"type": "ratio", "keep": 0.3}}).resolve(family)
        for features in (encoded[0], encoded[-1]):
            plan = plan_tokens(features, policy, family=family)
            assert 0 < len(plan.kept) <= int(0.3 * features.num_tokens + 0.5)
            newlines = len(sequence(features, plan)) - len(plan.kept)
            assert newlines == (0 if features.newline is None else features.canvas[0])


def test_a_blank_image_can_be_encoded(processor: Any) -> None:
    warm_up(processor)
    assert encode_image(processor, MediaWithBytes(Image.new("RGB", (64, 64)), b"")).num_tokens > 1


def test_the_vision_encoder_is_all_that_is_held(encoder: Encoder, model: Any, row: Row, readable: Path) -> None:
    """It has the parameters that transformers' features depend on."""
    rows, deepstack = image_features(model, row, readable, PICTURES[0])
    (rows.sum() + (0 if deepstack is None else deepstack.sum())).backward()
    used = {name: weights for name, weights in model.named_parameters() if weights.grad is not None}
    assert not any(map(in_language_model, used))
    assert encoder.num_parameters == sum(weights.numel() for weights in used.values())
    assert encoder.nbytes == 4 * encoder.num_parameters
    assert encoder.weights == "checkpoint"
    model.zero_grad()


def test_rows_are_those_of_the_token_table(encoder: Encoder, model: Any) -> None:
    ids = [5, 700, 5]
    assert torch.equal(encoder.token_rows(ids), model.get_input_embeddings().weight[ids])


def test_half_precision_stays_close(
    checkpoint: Path, images: list[PreparedImage], encoded: Sequence[VisualFeatures]
) -> None:
    half = encoder_of(checkpoint, dtype="bfloat16")
    for rounded, exact in zip(half.encode(images[:2]), encoded, strict=False):
        assert rounded.embeds.dtype == rounded.encoder.dtype == torch.bfloat16
        assert rounded.cls_attention is None or rounded.cls_attention.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(exact.embeds, rounded.embeds.float(), dim=-1).min() > 0.98
    assert half.token_rows([1]).dtype == torch.bfloat16


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
    [place] = process_prompt(processor, [processor.image_token_id], [picture], **options)["mm_placeholders"]["image"]
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
    processor = processor_of(directory)
    images = [preprocess(processor, picture) for picture in PICTURES]
    encoder = processor.runtime.local.vision_encoder
    encoded, references = encoder.encode(images), references_of(model, row, directory, images)
    test_what_the_language_model_reads(encoded, references, model)
    test_what_feeds_the_connector_belongs_to_its_token(encoded, references, images)
    test_attention_and_keys(encoded, references, row, processor)
    test_the_vision_encoder_is_all_that_is_held(encoder, model, row, directory)

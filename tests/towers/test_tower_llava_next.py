"""The LLaVA-NeXT tower: transformers' features in transformers' order, its tiles, and the newlines that stay."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration as Served
from vllm.model_executor.models.llava_next import LlavaNextProcessingInfo

from tests.support.released import released_clip, under, write_sparse_shards
from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.demo.llava_next import write_llava_next_checkpoint
from vllm_vtprune.policy import LLAVA_NEXT
from vllm_vtprune.selectors.registry import SELECTORS
from vllm_vtprune.towers import load_tower
from vllm_vtprune.towers.clip import TOKEN_TABLE
from vllm_vtprune.towers.llava_next import ALIASES, Layout, LlavaNextTower, build_module, layout
from vllm_vtprune.towers.weights import CheckpointReader

RELEASED_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
RENAMES = {
    "released": (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.image_newline", "image_newline"),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "in memory, transformers 5": (),
    "in memory, transformers 4.52": (("model.vision_tower.", "model.vision_tower.vision_model."),),
}
SIZES = [(35, 35), (60, 140), (140, 35), (35, 140), (71, 64), (300, 3), (3, 300), (50, 75)]  # height, width
"""Every number of squares of a model with squares of 35 pixels, and images so flat or thin that no token is left."""


@pytest.fixture(scope="module")
def model() -> LlavaNextForConditionalGeneration:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=35,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
        ),
        image_token_index=99,
        image_grid_pinpoints=[[35, 70], [70, 35], [70, 70], [105, 35], [35, 105]],
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def tower(model: Any, save: Any, tmp_path_factory: pytest.TempPathFactory) -> LlavaNextTower:
    return load(save(model, tmp_path_factory.mktemp("next"), RENAMES["released"]), model.config)


def load(directory: Path, config: LlavaNextConfig, **options: Any) -> LlavaNextTower:
    options = {"dtype": torch.float32, "device": "cpu", **options}
    tower = load_tower(directory, architecture="LlavaNextForConditionalGeneration", hf_config=config, **options)
    assert isinstance(tower, LlavaNextTower)
    return tower


def prepared(size: tuple[int, int], padding: int = 0) -> dict[str, torch.Tensor]:
    """An image of noise, cut into as many squares as an image of this size is."""
    its = layout_of(size)
    generator = torch.Generator().manual_seed(size[0] * 1000 + size[1])
    pixels = torch.randn(its.squares, 3, 35, 35, generator=generator)
    return {
        "pixel_values": torch.cat([pixels, torch.zeros(padding, 3, 35, 35)]),
        "image_sizes": torch.tensor(size),
    }


def layout_of(size: tuple[int, int]) -> Layout:
    return layout(*size, pinpoints=((35, 70), (70, 35), (70, 70), (105, 35), (35, 105)), image_size=35, side=5)


@torch.no_grad()
def reference(model: LlavaNextForConditionalGeneration, image: dict[str, torch.Tensor]) -> torch.Tensor:
    """(T, d): what transformers' model reads of the image."""
    out = model.model.get_image_features(image["pixel_values"][None], image["image_sizes"][None])
    return out.pooler_output[0]


def packed(model: LlavaNextForConditionalGeneration, values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N,): one value for each token of each square (squares, n), in transformers' order, without newlines."""
    [tokens], _ = model.model.pack_image_features([values[..., None]], torch.tensor([size]), "default", None)
    return tokens[:, 0]


def everything(features: VisualFeatures) -> Any:
    return SimpleNamespace(kept=torch.arange(features.num_tokens), embeds=features.embeds)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", [0, 2])
def test_with_every_token_the_sequence_is_transformers(
    size: tuple[int, int], padding: int, tower: LlavaNextTower, model: Any
) -> None:
    expected = reference(model, prepared(size))
    [features] = tower.encode([prepared(size, padding)])
    torch.testing.assert_close(tower.sequence(features, everything(features)), expected, rtol=1e-5, atol=1e-5)
    assert tower.sequence_length(features) == len(expected)
    assert features.grid is None
    assert features.tiles is not None
    assert features.tiles.grids[0] == (5, 5)
    assert features.tiles.boxes[0] is None
    assert [len(positions) for positions, _ in features.planes()] == [r * c for r, c in features.grids]


@pytest.mark.parametrize("naming", RENAMES)
def test_every_naming_scheme(naming: str, model: Any, save: Any, tmp_path: Path) -> None:
    tower = load(save(model, tmp_path, RENAMES[naming]), model.config)
    [features] = tower.encode([prepared((60, 140))])
    sequence = tower.sequence(features, everything(features))
    torch.testing.assert_close(sequence, reference(model, prepared((60, 140))), rtol=1e-5, atol=1e-5)
    assert torch.equal(tower.token_rows([3, 99]), model.get_input_embeddings().weight[[3, 99]])


@pytest.mark.parametrize("size", SIZES)
def test_features_lie_where_transformers_puts_them(size: tuple[int, int], tower: LlavaNextTower, model: Any) -> None:
    image = prepared(size)
    [features] = tower.encode([image])
    vision = model.model.vision_tower
    vision.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = vision(image["pixel_values"], output_attentions=True, output_hidden_states=True)
    finally:
        vision.set_attn_implementation("sdpa")
    cls = out.attentions[-2][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(features.cls_attention, packed(model, cls, size), rtol=1e-4, atol=1e-6)
    early = out.attentions[0][0, :, 0, 1:].mean(0)
    torch.testing.assert_close(features.overview_attention, early, rtol=1e-4, atol=1e-6)
    for channel in (0, 31):
        states = out.hidden_states[-2][:, 1:, channel]
        torch.testing.assert_close(features.encoder[:, channel], packed(model, states, size), rtol=1e-4, atol=1e-5)

    squares = torch.arange(len(image["pixel_values"]))[:, None].expand(-1, 25)  # of each token, its square
    tiles = features.tiles
    assert tiles is not None
    found = packed(model, squares.float(), size).long()
    present = found.unique().tolist()
    assert torch.equal(tiles.ids, torch.tensor([present.index(square) for square in found.tolist()]))
    assert [int((tiles.ids == i).sum()) for i in range(len(tiles.grids))] == [r * c for r, c in tiles.grids]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in tiles.boxes if box is not None]
    assert not areas or sum(areas) == pytest.approx(1)


@settings(max_examples=500)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_layouts_have_as_many_tokens_and_rows_as_vllm_counts(height: int, width: int) -> None:
    its = layout(height, width, pinpoints=RELEASED_PINPOINTS, image_size=336, side=24)
    count_squares = LlavaNextProcessingInfo._get_num_unpadded_features
    down, across = grid_of(height, width)
    tokens, newlines = count_squares(
        None,
        original_height=height,
        original_width=width,
        npatches=24,
        num_patch_height=down,
        num_patch_width=across,
    )
    assert its.squares == 1 + down * across
    assert its.tiles.canvas is not None
    rows, columns = its.tiles.canvas
    assert (rows * columns, rows) == (tokens, newlines)
    assert len(its.sources) == len(its.tiles.ids) == 576 + tokens
    assert len(its.sources.unique()) == len(its.sources)
    assert sum(r * c for r, c in its.tiles.grids) == 576 + tokens


def grid_of(height: int, width: int) -> tuple[int, int]:
    return get_anyres_image_grid_shape((height, width), [list(p) for p in RELEASED_PINPOINTS], 336)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 73), (73, 1), (14, 1008), (1008, 14), (2, 3)])
def test_layouts_of_extreme_images(size: tuple[int, int]) -> None:
    test_layouts_have_as_many_tokens_and_rows_as_vllm_counts.hypothesis.inner_test(*size)  # type: ignore[attr-defined]


def test_the_papers_2880_tokens() -> None:
    its = layout(672, 672, pinpoints=RELEASED_PINPOINTS, image_size=336, side=24)
    assert len(its.sources) == 2880
    assert its.tiles.grids == ((24, 24),) * 5
    assert its.tiles.boxes == (None, (0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1))


@settings(max_examples=60)
@given(size=st.sampled_from(SIZES), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_row_keeps_its_newline_as_long_as_it_keeps_a_token(
    tower: LlavaNextTower, size: tuple[int, int], share: float, seed: int
) -> None:
    [features] = tower.encode([prepared(size)])
    n = features.num_tokens
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(1, round(share * n))].sort().values
    sequence = tower.sequence(features, SimpleNamespace(kept=kept, embeds=features.embeds[kept]))  # type: ignore[arg-type]

    assert features.tiles is not None
    assert features.tiles.canvas is not None
    rows, columns = features.tiles.canvas
    remaining = set(kept.tolist())
    expected = [features.embeds[i] for i in range(25) if i in remaining]
    for row in range(rows):
        tokens = range(25 + row * columns, 25 + (row + 1) * columns)
        expected += [features.embeds[i] for i in tokens if i in remaining]
        if not tokens or remaining & set(tokens):
            expected.append(tower.image_newline)
    assert torch.equal(sequence, torch.stack(expected))


@pytest.mark.parametrize("method", SELECTORS)
def test_every_method_works_on_tiles(method: str, tower: LlavaNextTower) -> None:
    policy = PruningPolicy.parse({"method": method, "budget": {"type": "ratio", "keep": 0.3}})
    for features in tower.encode([prepared((60, 140))]) + tower.encode([prepared((300, 3))]):
        plan = plan_tokens(features, policy.resolve(LLAVA_NEXT), family=LLAVA_NEXT)
        assert 0 < len(plan.kept) <= round(0.3 * features.num_tokens)
        newlines = len(tower.sequence(features, plan)) - len(plan.kept)
        assert 0 < newlines <= features.tiles.canvas[0]  # type: ignore[union-attr,index]


def test_images_of_one_batch_and_images_alone(tower: LlavaNextTower, model: Any) -> None:
    sizes = [(71, 64), (70, 70), (64, 71)]  # five squares each, and other canvases
    together = tower.encode([prepared(size) for size in sizes])
    for size, features in zip(sizes, together, strict=True):
        sequence = tower.sequence(features, everything(features))
        torch.testing.assert_close(sequence, reference(model, prepared(size)), rtol=1e-5, atol=1e-5)
        for tensor in (features.encoder, features.embeds, features.cls_attention, features.keys):
            assert tensor is not None
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert tower.encode([]) == []


def test_pixels_that_do_not_fit_the_size(tower: LlavaNextTower) -> None:
    image = prepared((71, 64))
    for pixels in (image["pixel_values"][:4], image["pixel_values"][0], torch.zeros(5, 3, 35, 42)):
        with pytest.raises(ValueError, match=r"expected \(5, 3, 35, 35\)"):
            tower.encode([{**image, "pixel_values": pixels}])


def test_a_blank_image_and_dummy_weights(model: Any) -> None:
    one, same, other = (load(Path("/nonexistent"), model.config, load_format="dummy", seed=seed) for seed in (0, 0, 1))
    one.encode([one.blank()])
    assert torch.equal(one.image_newline, same.image_newline)
    assert not torch.equal(one.image_newline, other.image_newline)
    assert one.weights == "dummy"


RELEASED = {  # of the language models: their configs, their widths, and the rows of their token tables
    "vicuna-7b": (LlamaConfig, 4096, 32_064),
    "vicuna-13b": (LlamaConfig, 5120, 32_064),
    "mistral-7b": (MistralConfig, 4096, 32_064),
    "llama3-8b": (LlamaConfig, 4096, 128_320),
    "34b": (LlamaConfig, 7168, 64_064),
}


def released(language_model: str) -> dict[str, tuple[int, ...]]:
    """What a release stores of its tower, projector, newline and token table."""
    _, width, vocabulary = RELEASED[language_model]
    return released_clip(width, vocabulary) | {"image_newline": (width,)}


@pytest.mark.parametrize("naming", RENAMES)
@pytest.mark.parametrize("language_model", RELEASED)
def test_the_released_layout_is_consumed_exactly_once(language_model: str, naming: str, tmp_path: Path) -> None:
    """In three shards: the projector's, the newline's and the table's shapes follow the language model."""
    stored = {
        under(RENAMES[naming], RENAMES["released"], name): shape for name, shape in released(language_model).items()
    }
    assert len(stored) == 24 * 16 + 13
    write_sparse_shards(tmp_path, stored, shards=3)
    text_class, width, vocabulary = RELEASED[language_model]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=text_class(hidden_size=width, vocab_size=vocabulary),
    )
    module = build_module(config)
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()} | {TOKEN_TABLE: (vocabulary, width)}
    plan = CheckpointReader(tmp_path, ALIASES).plan(expected)
    assert set(plan) == set(expected)
    assert max(Counter(plan.values()).values()) == 1
    unread = set(stored) - set(plan.values())
    assert len(unread) == 16 + 2
    assert all(".layers.23." in name or ".post_layernorm." in name for name in unread)


def test_vllms_mapper_knows_the_released_tensors() -> None:
    """vLLM's modules are called as the released tensors are: its mapper leaves those alone, and knows the others.

    But for the encoder as transformers 5 has it in memory: that has no `vision_model`, which vLLM's has.
    """
    names = list(released("vicuna-7b"))
    for naming in RENAMES:
        mapped = Served.hf_to_vllm_mapper.apply_list(
            [under(RENAMES[naming], RENAMES["released"], name) for name in names]
        )
        if naming == "in memory, transformers 5":
            mapped = [name.replace("vision_tower.", "vision_tower.vision_model.") for name in mapped]
        assert mapped == names


@pytest.mark.parametrize("naming", ["vllm", "module"])
def test_the_demos_checkpoints_are_called_as_the_released_ones(naming: Any, tmp_path: Path) -> None:
    directory = write_llava_next_checkpoint(tmp_path, image_size=112, naming=naming, shards=2)
    written = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    schemes = {"vllm": "released", "module": "in memory, transformers 5"}
    layers = CLIPVisionConfig.from_pretrained(directory).num_hidden_layers
    expected = {
        under(RENAMES[schemes[naming]], RENAMES["released"], name)
        for name in released("vicuna-7b")
        if not any(f".layers.{layer}." in name for layer in range(layers, 24))
    }
    assert expected <= set(written)
    assert not [name for name in set(written) - expected if "language_model." not in name and "lm_head" not in name]

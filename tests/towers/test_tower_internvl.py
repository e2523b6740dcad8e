"""The InternVL tower: transformers' features, its tiles, and attention and keys pooled over blocks of patches."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration as Served

from tests.support.released import under, write_sparse_shards
from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune.demo.internvl import write_internvl_checkpoint
from vllm_vtprune.policy import INTERNVL
from vllm_vtprune.selectors.registry import SELECTORS
from vllm_vtprune.towers import TowerError, load_tower
from vllm_vtprune.towers.internvl import ALIASES, TOKEN_TABLE, InternVLTower, build_module, shuffled
from vllm_vtprune.towers.weights import CheckpointReader

RENAMES = {
    "released": (
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "in memory": (),
}
GRIDS = [(1, 1), (1, 2), (3, 2), (12, 1)]
PATCHES = 6  # in either direction, in a tile of 42 pixels


def config_of(**vision: Any) -> InternVLConfig:
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=[42, 42],
            patch_size=[7, 7],
            **{"attention_bias": True, **vision},
        ),
        text_config=Qwen2Config(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        ),
        image_token_id=99,
        tie_word_embeddings=False,
    )


def model_of(config: InternVLConfig) -> InternVLForConditionalGeneration:
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def model() -> InternVLForConditionalGeneration:
    return model_of(config_of())


@pytest.fixture(scope="module")
def tower(model: Any, save: Any, tmp_path_factory: pytest.TempPathFactory) -> InternVLTower:
    return load(save(model, tmp_path_factory.mktemp("internvl"), RENAMES["released"]), model.config)


def load(directory: Path, config: InternVLConfig, **options: Any) -> InternVLTower:
    options = {"dtype": torch.float32, "device": "cpu", **options}
    tower = load_tower(directory, architecture="InternVLForConditionalGeneration", hf_config=config, **options)
    assert isinstance(tower, InternVLTower)
    return tower


def prepared(rows: int, columns: int) -> dict[str, torch.Tensor]:
    tiles = rows * columns + (rows * columns > 1)
    generator = torch.Generator().manual_seed(tiles)
    return {
        "pixel_values": torch.randn(tiles, 3, 42, 42, generator=generator),
        "tile_grid": torch.tensor([rows, columns]),
    }


@torch.no_grad()
def reference(model: InternVLForConditionalGeneration, image: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.get_image_features(pixel_values=image["pixel_values"]).pooler_output.flatten(0, 1)


@pytest.mark.parametrize("naming", RENAMES)
@pytest.mark.parametrize(
    "vision", [{}, {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}, {"use_mean_pooling": False}]
)
def test_features_are_those_of_transformers(naming: str, vision: dict[str, Any], save: Any, tmp_path: Path) -> None:
    model = model_of(config_of(**vision))
    tower = load(save(model, tmp_path, RENAMES[naming]), model.config)
    images = [prepared(*grid) for grid in GRIDS]
    for image in images:
        [features] = tower.encode([image])
        torch.testing.assert_close(features.embeds, reference(model, image), rtol=1e-5, atol=1e-5)
    assert torch.equal(tower.token_rows([3, 99]), model.get_input_embeddings().weight[[3, 99]])


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_tiles(rows: int, columns: int, tower: InternVLTower) -> None:
    [features] = tower.encode([prepared(rows, columns)])
    assert tower.sequence_length(features) == features.num_tokens
    if rows * columns == 1:
        assert features.grid == (3, 3)
        assert features.tiles is features.overview is features.overview_attention is None
        return
    tiles = features.tiles
    assert features.grid is None
    assert tiles is not None
    count = rows * columns + 1
    assert tiles.ids.tolist() == [tile for tile in range(count) for _ in range(9)]
    assert tiles.grids == ((3, 3),) * count
    assert tiles.overview == count - 1
    assert tiles.boxes[0] == (0, 0, 1 / rows, 1 / columns)
    assert tiles.boxes[count - 2] == pytest.approx((1 - 1 / rows, 1 - 1 / columns, 1, 1))
    assert tiles.boxes[1] == ((0, 1 / columns, 1 / rows, 2 / columns) if columns > 1 else (1 / rows, 0, 2 / rows, 1))
    assert len(features.planes()) == count


def test_attention_and_keys_are_pooled_over_the_patches_of_a_token(tower: InternVLTower, model: Any) -> None:
    image = prepared(1, 2)
    [features] = tower.encode([image])
    vision = model.model.vision_tower
    vision.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = vision(image["pixel_values"], output_attentions=True, output_hidden_states=True)
    finally:
        vision.set_attn_implementation("sdpa")

    def pooled(patches: torch.Tensor) -> torch.Tensor:
        """(tiles, 36, ...) -> (tiles * 9, ...): sums over blocks of 2 x 2, block by block."""
        grid = patches.unflatten(1, (PATCHES, PATCHES))
        blocks = [grid[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].sum(dim=(1, 2)) for r in range(3) for c in range(3)]
        return torch.stack(blocks, dim=1).flatten(0, 1)

    last, first = (out.attentions[layer][:, :, 0, 1:].mean(1) for layer in (-1, 0))
    assert last.std() > 0.2 * last.mean(), "a near-uniform map would hide an error"
    torch.testing.assert_close(features.cls_attention, pooled(last), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(features.overview_attention, pooled(first)[-9:], rtol=1e-4, atol=1e-6)
    layer = vision.encoder.layer[-1]
    with torch.no_grad():
        keys = layer.attention.k_proj(layer.layernorm_before(out.hidden_states[-2]))[:, 1:]
    torch.testing.assert_close(features.keys, pooled(keys.unflatten(-1, (4, 8)).mean(dim=2)) / 4, rtol=1e-4, atol=1e-5)


def test_shuffled_is_transformers_pixel_shuffle(model: Any) -> None:
    patches = torch.randn(2, 36, 5)
    expected = model.model.pixel_shuffle(patches.view(2, 6, 6, 5), scale_factor=0.5)
    assert torch.equal(shuffled(patches, 2).flatten(2), expected.flatten(1, 2))


@pytest.mark.parametrize("method", SELECTORS)
def test_every_method_works_on_tiles(method: str, tower: InternVLTower) -> None:
    policy = PruningPolicy.parse({"method": method, "budget": {"type": "ratio", "keep": 0.3}}).resolve(INTERNVL)
    for grid in GRIDS:
        [features] = tower.encode([prepared(*grid)])
        plan = plan_tokens(features, policy, family=INTERNVL)
        assert 0 < len(tower.sequence(features, plan)) == len(plan.kept) <= round(0.3 * features.num_tokens)


def test_images_of_one_batch_and_images_alone(tower: InternVLTower, model: Any) -> None:
    images = [prepared(2, 3), prepared(3, 2), prepared(6, 1), prepared(1, 6)]
    for image, features in zip(images, tower.encode(images), strict=True):
        torch.testing.assert_close(features.embeds, reference(model, image), rtol=1e-5, atol=1e-5)
        for tensor in (features.encoder, features.embeds, features.cls_attention, features.keys):
            assert tensor is not None
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert tower.encode([]) == []


def test_pixels_that_do_not_fit_the_grid(tower: InternVLTower) -> None:
    for grid, shape in (((2, 3), (6, 3, 42, 42)), ((1, 1), (2, 3, 42, 42)), ((1, 1), (1, 3, 42, 35))):
        with pytest.raises(ValueError, match="pixel_values have shape"):
            tower.encode([{"pixel_values": torch.zeros(shape), "tile_grid": torch.tensor(grid)}])


def test_a_blank_image_and_dummy_weights(model: Any) -> None:
    one, same, other = (load(Path("/nonexistent"), model.config, load_format="dummy", seed=seed) for seed in (0, 0, 1))
    one.encode([one.blank()])
    embeds = [tower.encode([prepared(1, 1)])[0].embeds for tower in (one, same, other)]
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.allclose(embeds[0], embeds[2])


def test_configs_that_are_not_supported() -> None:
    for change in ({"vision_feature_layer": -2}, {"vision_feature_select_strategy": "full"}):
        config = config_of()
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(TowerError, match="supported: -1 with 'default'"):
            build_module(config)
    config = config_of()
    config.vision_config.image_size = [42, 84]
    with pytest.raises(TowerError, match="expected a square"):
        build_module(config)


def released(qk_norm: bool, d: int, ff: int, layers: int, text: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """What an InternVL3 checkpoint in transformers' layout stores of its tower, projector and token table."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.embeddings.cls_token": (1, 1, d),
        "vision_tower.embeddings.position_embeddings": (1, 1025, d),
        "vision_tower.embeddings.patch_embeddings.projection.weight": (d, 3, 14, 14),
        "vision_tower.embeddings.patch_embeddings.projection.bias": (d,),
        "multi_modal_projector.layer_norm.weight": (4 * d,),
        "multi_modal_projector.layer_norm.bias": (4 * d,),
        "multi_modal_projector.linear_1.weight": (text, 4 * d),
        "multi_modal_projector.linear_1.bias": (text,),
        "multi_modal_projector.linear_2.weight": (text, text),
        "multi_modal_projector.linear_2.bias": (text,),
        "language_model.model.embed_tokens.weight": (vocabulary, text),
    }
    layer: dict[str, tuple[int, ...]] = {f"attention.{p}_proj.weight": (d, d) for p in ("q", "k", "v")}
    layer |= {"attention.projection_layer.weight": (d, d), "attention.projection_layer.bias": (d,)}
    layer |= {"lambda_1": (d,), "lambda_2": (d,), "layernorm_before.weight": (d,), "layernorm_after.weight": (d,)}
    layer |= {"mlp.fc1.weight": (ff, d), "mlp.fc1.bias": (ff,), "mlp.fc2.weight": (d, ff), "mlp.fc2.bias": (d,)}
    if qk_norm:
        layer |= {"attention.q_norm.weight": (d,), "attention.k_norm.weight": (d,)}
    else:
        layer |= {f"attention.{p}_proj.bias": (d,) for p in ("q", "k", "v")}
        layer |= {"layernorm_before.bias": (d,), "layernorm_after.bias": (d,)}
    for i in range(layers):
        shapes |= {f"vision_tower.encoder.layer.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


@pytest.mark.parametrize("naming", RENAMES)
@pytest.mark.parametrize("large", [False, True], ids=["1B", "38B"])
def test_the_released_layout_is_consumed_exactly_once(large: bool, naming: str, tmp_path: Path) -> None:
    if large:
        stored = released(True, d=3200, ff=12800, layers=45, text=5120, vocabulary=151674)
        vision = dict(hidden_size=3200, intermediate_size=12800, num_hidden_layers=45, num_attention_heads=25)
        vision |= dict(use_qk_norm=True, norm_type="rms_norm", attention_bias=False)
        text = dict(hidden_size=5120)
    else:
        stored = released(False, d=1024, ff=4096, layers=24, text=896, vocabulary=151674)
        vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        vision |= dict(attention_bias=True)
        text = dict(hidden_size=896)
    stored = {under(RENAMES[naming], RENAMES["released"], name): shape for name, shape in stored.items()}
    write_sparse_shards(tmp_path, stored, shards=3)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision), text_config=Qwen2Config(vocab_size=151674, **text)
    )
    module = build_module(config)
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    expected[TOKEN_TABLE] = (151674, text["hidden_size"])
    plan = CheckpointReader(tmp_path, ALIASES).plan(expected)
    assert set(plan) == set(expected)
    assert Counter(plan.values()) == Counter(stored.keys())


@pytest.mark.parametrize("qk_norm", [False, True], ids=["1B", "38B"])
@pytest.mark.parametrize("naming", RENAMES)
def test_vllms_mapper_knows_the_released_tensors(naming: str, qk_norm: bool) -> None:
    """vLLM's modules are called as the released tensors are: its mapper leaves those alone, and knows the others."""
    names = list(released(qk_norm, d=1024, ff=4096, layers=24, text=896, vocabulary=151674))
    assert (
        Served.hf_to_vllm_mapper.apply_list([under(RENAMES[naming], RENAMES["released"], name) for name in names])
        == names
    )


@pytest.mark.parametrize("naming", ["vllm", "module"])
def test_the_demos_checkpoints_are_called_as_the_released_ones(naming: Any, tmp_path: Path) -> None:
    directory = write_internvl_checkpoint(tmp_path, image_size=112, naming=naming, shards=2)
    names = list(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])
    mapped = set(Served.hf_to_vllm_mapper.apply_list(names))
    vision = {
        name
        for name in released(False, d=128, ff=256, layers=4, text=256, vocabulary=2304)
        if not name.startswith("language_model.")
    }
    assert vision == {name for name in mapped if not name.startswith("language_model.")}
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= mapped
    assert naming != "vllm" or mapped == set(names)

"""The Qwen2.5-VL tower computes what transformers computes, on any grid, and finds its tensors in released layouts."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Served

from tests.support.images import sample_images
from tests.support.released import write_sparse_shards
from vllm_vtprune.demo.qwen2_5_vl import qwen2_5_vl_config, write_qwen2_5_vl_checkpoint
from vllm_vtprune.towers import CheckpointReader, TowerError, VisionTower, load_tower
from vllm_vtprune.towers import qwen2_5_vl as tower_module
from vllm_vtprune.towers.base import PixelNorm
from vllm_vtprune.towers.qwen2_5_vl import ALIASES, TOKEN_TABLE, build_module, segments_by_length

SIZES = ((336, 336), (112, 448), (448, 112), (84, 84), (308, 252), (56, 56), (140, 28 * 13))  # pixels
PATCH = 3 * 2 * 14 * 14


def load(directory, config, dtype=torch.float32, **options) -> VisionTower:
    architecture = "Qwen2_5_VLForConditionalGeneration"
    return load_tower(
        directory, architecture=architecture, hf_config=config, dtype=dtype, **{"device": "cpu", **options}
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_qwen2_5_vl_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tower(checkpoint, model):
    return load(checkpoint, model.config)


def prepare(**options: Any) -> list[dict[str, torch.Tensor]]:
    images = [image.resize(size) for image, size in zip(sample_images(len(SIZES)), SIZES, strict=True)]
    inputs = Qwen2VLImageProcessor()(images=images, return_tensors="pt", **options)
    pixels = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=1).tolist())
    return [
        {"pixel_values": own, "image_grid_thw": grid}
        for own, grid in zip(pixels, inputs["image_grid_thw"], strict=True)
    ]


@pytest.fixture(scope="module")
def images():
    return prepare()


@pytest.fixture(scope="module")
def expected(model, images):
    with torch.no_grad():
        return [
            model.get_image_features(image["pixel_values"], image["image_grid_thw"][None]).pooler_output[0]
            for image in images
        ]


def assert_features(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) == len(SIZES)
    for features, embeds, (width, height) in zip(found, expected, SIZES, strict=True):
        torch.testing.assert_close(features.embeds, embeds, rtol=tolerance, atol=tolerance)
        assert features.grid == (height // 28, width // 28)


@pytest.mark.parametrize(("naming", "shards", "tied"), [("vllm", 1, False), ("vllm", 3, True), ("module", 2, True)])
def test_every_layout_gives_transformers_features(naming, shards, tied, model, images, expected, tmp_path):
    write_qwen2_5_vl_checkpoint(tmp_path, naming=naming, shards=shards, tied=tied)
    tower = load(tmp_path, model.config)
    assert_features(tower.encode(images), expected)
    ids = [3, 0, 2053, 3]
    assert torch.equal(tower.token_rows(ids), model.get_input_embeddings().weight[ids])
    assert tower.weights == "checkpoint"


def test_raw_pixels_are_normalised_as_the_image_processor_would(checkpoint, model, expected):
    processor = Qwen2VLImageProcessor()
    norm = PixelNorm(tuple(processor.image_mean), tuple(processor.image_std), processor.rescale_factor)
    raw = prepare(do_rescale=False, do_normalize=False)
    assert raw[0]["pixel_values"].dtype == torch.uint8
    tower = load(checkpoint, model.config, pixel_norm=norm)
    assert_features(tower.encode(raw), expected, tolerance=1e-4)
    tower.encode([tower.blank()])


def test_alone_in_batches_and_in_any_order(tower, images, expected, monkeypatch):
    assert_features([tower.encode([image])[0] for image in images], expected)
    monkeypatch.setattr(tower_module, "BATCH_PATCHES", 300)
    assert_features(tower.encode(images), expected)
    assert_features(tower.encode(images[::-1])[::-1], expected)
    assert tower.encode([]) == []


def test_images_do_not_share_memory_and_hold_one_tensor(tower, images):
    for features in tower.encode(images):
        assert features.encoder is features.embeds
        assert features.embeds.untyped_storage().nbytes() == features.embeds.nbytes == features.nbytes
        assert not features.embeds.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, checkpoint, model, images, expected):
    half = load(checkpoint, model.config, dtype=dtype)
    for features, exact in zip(half.encode(images), expected, strict=True):
        assert features.embeds.dtype == dtype
        cosine = torch.nn.functional.cosine_similarity(exact, features.embeds.float(), dim=-1)
        assert cosine.min() > 0.99


def test_float16_does_not_overflow(checkpoint, model, images):
    half = load(checkpoint, model.config, dtype=torch.float16)
    half._visual.blocks[-1].mlp.down_proj.bias.fill_(60_000)
    half._visual.blocks[-1].attn.proj.bias.fill_(60_000)
    assert all(torch.isfinite(features.embeds).all() for features in half.encode(images))


def test_segments_cover_each_position_once():
    segments = segments_by_length(torch.tensor([0, 3, 5, 8, 9]))
    assert [tuple(positions.shape) for positions in segments] == [(1, 1), (1, 2), (2, 3)]
    assert sorted(torch.cat([positions.flatten() for positions in segments]).tolist()) == list(range(9))
    assert segments[2].tolist() == [[0, 1, 2], [5, 6, 7]]


@pytest.mark.parametrize(
    ("grid", "rows", "message"),
    [
        ((2, 4, 4), 32, r"image_grid_thw is \[2, 4, 4\]; expected one frame and multiples of 2"),
        ((1, 3, 4), 12, r"image_grid_thw is \[1, 3, 4\]; expected one frame and multiples of 2"),
        ((1, 4, 4), 12, r"pixel_values have shape \(12, 1176\); expected \(16, 1176\)"),
    ],
)
def test_other_shapes_are_refused(tower, grid, rows, message):
    with pytest.raises(ValueError, match=message):
        tower.encode([{"pixel_values": torch.zeros(rows, PATCH), "image_grid_thw": torch.tensor(grid)}])


def test_dummy_weights_are_seeded_and_leave_tokens_distinct(model, images):
    first, again, other = (load("/", model.config, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert first.weights == "dummy"
    one = first.encode(images[:1])[0].embeds
    assert torch.equal(one, again.encode(images[:1])[0].embeds)
    assert not torch.equal(one, other.encode(images[:1])[0].embeds)
    assert torch.nn.functional.cosine_similarity(one[0], one[-1], dim=0) < 0.99
    assert torch.equal(first.token_rows([5]), again.token_rows([5]))


def test_a_merger_that_does_not_fit_the_language_model():
    config = qwen2_5_vl_config("tiny")
    config.vision_config.out_hidden_size = 100
    with pytest.raises(TowerError, match="out_hidden_size=100 is not the language model's hidden_size=256"):
        build_module(config)


# What config.json of Qwen/Qwen2.5-VL-3B-Instruct and 7B-Instruct says of shapes: flat, as before transformers 5.
RELEASED: dict[str, dict[str, Any]] = {
    "3b": dict(
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
}


def released_config(size: str) -> Qwen2_5_VLConfig:
    shared = dict(
        image_token_id=151_655,
        video_token_id=151_656,
        max_position_embeddings=128_000,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        vision_config=dict(
            depth=32,
            hidden_act="silu",
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            in_chans=3,
            out_hidden_size=RELEASED[size]["hidden_size"],
            patch_size=14,
            spatial_merge_size=2,
            spatial_patch_size=14,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
            tokens_per_second=2,
            temporal_patch_size=2,
        ),
    )
    return Qwen2_5_VLConfig.from_dict(shared | RELEASED[size])


def released_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """What the released model stores of its encoder, merger and token table."""
    d, ff, merged, text = 1280, 3420, 5120, RELEASED[size]["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (d, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (d,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (text, merged),
        "visual.merger.mlp.2.bias": (text,),
        "model.embed_tokens.weight": (RELEASED[size]["vocab_size"], text),
    }
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (d,),
        "norm2.weight": (d,),
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "mlp.gate_proj.weight": (ff, d),
        "mlp.gate_proj.bias": (ff,),
        "mlp.up_proj.weight": (ff, d),
        "mlp.up_proj.bias": (ff,),
        "mlp.down_proj.weight": (d, ff),
        "mlp.down_proj.bias": (d,),
    }
    return shapes | {f"visual.blocks.{i}.{name}": shape for i in range(32) for name, shape in block.items()}


MODULE_NAMES = {"visual.": "model.visual.", "model.embed_tokens.": "model.language_model.embed_tokens."}


def in_memory(name: str) -> str:
    """The module's name of a released tensor."""
    return next(new + name.removeprefix(old) for old, new in MODULE_NAMES.items() if name.startswith(old))


@pytest.mark.parametrize("size", RELEASED)
@pytest.mark.parametrize("rename", [lambda name: name, in_memory], ids=["released", "module"])
def test_the_released_layout_is_consumed_exactly_once(rename, size, tmp_path):
    stored = {rename(name): shape for name, shape in released_shapes(size).items()}
    assert len(stored) == 32 * 12 + 7
    write_sparse_shards(tmp_path, stored, shards=2)

    config = released_config(size)
    expected = {name: tuple(p.shape) for name, p in build_module(config).named_parameters()}
    table = (config.text_config.vocab_size, config.text_config.hidden_size)
    plan = CheckpointReader(tmp_path, ALIASES).plan(expected | {TOKEN_TABLE: table})
    assert set(plan.values()) == set(stored)
    assert max(Counter(plan.values()).values()) == 1


@pytest.mark.parametrize("size", RELEASED)
def test_the_listed_names_are_all_that_transformers_and_vllm_have(size):
    """Of the tower: the list is transformers' own, and vLLM's mapper sends either scheme to the same places."""
    with torch.device("meta"):
        whole = Qwen2_5_VLForConditionalGeneration(released_config(size))
    listed = {in_memory(name): shape for name, shape in released_shapes(size).items()}
    held = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert listed == {name: shape for name, shape in held.items() if ".visual." in name or ".embed_tokens." in name}

    mapper = Served.hf_to_vllm_mapper
    for name in released_shapes(size):
        mapped = mapper._map_name(name)
        assert mapped == mapper._map_name(in_memory(name))
        assert mapped == (name if name.startswith("visual.") else "language_model.model.embed_tokens.weight")


def test_the_3b_checkpoint_of_the_demo_has_the_released_config():
    ours, released = qwen2_5_vl_config("3b", tied=True), released_config("3b")
    unread = {"in_chans", "spatial_patch_size"}  # older names, which transformers keeps and does not use
    told = {name: value for name, value in released.vision_config.to_dict().items() if name not in unread}
    assert ours.vision_config.to_dict() == told
    text = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for field in (*text, "vocab_size", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours.text_config, field) == getattr(released.text_config, field), field
    assert ours.text_config.rope_parameters | {"type": "mrope"} == released.text_config.rope_parameters
    assert ours.tie_word_embeddings == released.tie_word_embeddings

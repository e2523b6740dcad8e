"""The LLaVA tower computes what transformers computes, from any naming scheme, and loads only what it needs."""

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from tests.support.released import released_clip, under, write_sparse_shards
from vllm_vtprune.demo.checkpoint import write_llava_checkpoint
from vllm_vtprune.towers import TowerError, VisionTower, load_tower
from vllm_vtprune.towers.clip import ALIASES, TOKEN_TABLE, attend, build_module, feature_depths
from vllm_vtprune.towers.weights import CheckpointReader

RELEASED = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
NAMINGS = {
    "released": RELEASED,
    "saved by transformers 5": (("model.vision_tower.", "vision_tower."), *RELEASED[1:]),
    "in memory, transformers 5": (),
    "in memory, transformers 4.52": (("model.vision_tower.", "model.vision_tower.vision_model."),),
}


def load(directory, config, dtype=torch.float32, **options) -> VisionTower:
    options = {"device": "cpu", **options}
    return load_tower(directory, architecture="LlavaForConditionalGeneration", hf_config=config, dtype=dtype, **options)


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config()


@pytest.fixture(scope="module")
def model(tiny_model, config):
    return tiny_model(config)


@pytest.fixture(scope="module")
def tower(model, config, save, tmp_path_factory):
    return load(save(model, tmp_path_factory.mktemp("llava"), RELEASED), config)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 35, 35, generator=torch.Generator().manual_seed(1))


def encode(tower, pixels):
    """The features of a batch (B, 3, H, W)."""
    return tower.encode([{"pixel_values": image} for image in pixels])


@torch.no_grad()
def reference(model, pixels):
    """Projected features (B, N, d) of transformers, and its vision outputs with every hidden state."""
    out = model.get_image_features(
        pixels,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    )
    return torch.stack(list(out.pooler_output)), out


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_scheme_gives_transformers_features(naming, model, config, save, pixels, tmp_path):
    tower = load(save(model, tmp_path, NAMINGS[naming]), config)
    embeds, out = reference(model, pixels)
    for i, features in enumerate(encode(tower, pixels)):
        torch.testing.assert_close(features.embeds, embeds[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.encoder, out.hidden_states[-2][i, 1:], rtol=1e-5, atol=1e-5)
        assert features.grid == (5, 5)
    ids = [3, 0, 99, 3]
    assert torch.equal(tower.token_rows(ids), model.get_input_embeddings().weight[ids])
    assert tower.weights == "checkpoint"


@pytest.mark.parametrize(("naming", "shards"), [("vllm", 1), ("vllm", 3), ("transformers", 2), ("module", 1)])
def test_demo_checkpoint_equals_transformers(naming, shards, tmp_path):
    write_llava_checkpoint(tmp_path, naming=naming, shards=shards)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(2))
    embeds, _ = reference(model, pixels)
    tower = load(tmp_path, model.config)
    for i, features in enumerate(encode(tower, pixels)):
        torch.testing.assert_close(features.embeds, embeds[i], rtol=1e-4, atol=1e-4)
        assert features.grid == (24, 24)
    ids = [2047, 5, 5, 77]
    assert torch.equal(tower.token_rows(ids), model.get_input_embeddings().weight[ids])


def eager_attention(model, pixels):
    vision = model.model.vision_tower
    vision.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return vision(pixels, output_attentions=True).attentions
    finally:
        vision.set_attn_implementation("sdpa")


def test_cls_attention_is_that_of_the_selected_layer(tower, model, pixels):
    expected = eager_attention(model, pixels)[-2][:, :, 0, 1:].mean(1)
    assert expected.std() > 0.2 * expected.mean(), "a near-uniform map would hide an error"
    for i, features in enumerate(encode(tower, pixels)):
        torch.testing.assert_close(features.cls_attention, expected[i], rtol=1e-4, atol=1e-6)


def plain_keys(model, hidden_states, depth):
    """Keys of the layer that computes `hidden_states[depth]`, mean over heads, (B, N, d_h)."""
    layer = model.model.vision_tower.encoder.layers[depth - 1]
    keys = layer.self_attn.k_proj(layer.layer_norm1(hidden_states[depth - 1]))[:, 1:]
    return keys.unflatten(-1, (layer.self_attn.num_heads, -1)).mean(dim=2)


def test_keys_are_those_of_the_selected_layer(tower, model, pixels):
    _, out = reference(model, pixels)
    with torch.no_grad():
        expected = plain_keys(model, out.hidden_states, depth=3)
    for i, features in enumerate(encode(tower, pixels)):
        torch.testing.assert_close(features.keys, expected[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -3, 2, -5, 0, [-2, 1], [1, 4, 2]])
def test_other_feature_layers(layer, tiny_config, tiny_model, save, pixels, tmp_path):
    config = tiny_config(vision_feature_layer=layer)
    model = tiny_model(config)
    tower = load(save(model, tmp_path), config)
    embeds, out = reference(model, pixels)
    features = encode(tower, pixels)
    torch.testing.assert_close(torch.stack([f.embeds for f in features]), embeds, rtol=1e-5, atol=1e-5)
    deepest = max(feature_depths(config))
    if deepest == 0:
        assert features[0].cls_attention is features[0].keys is None
    else:
        expected = eager_attention(model, pixels)[deepest - 1][:, :, 0, 1:].mean(1)
        torch.testing.assert_close(torch.stack([f.cls_attention for f in features]), expected, rtol=1e-4, atol=1e-6)
        keys = plain_keys(model, out.hidden_states, deepest)
        torch.testing.assert_close(torch.stack([f.keys for f in features]), keys, rtol=1e-4, atol=1e-5)


def test_layers_past_the_selected_one_are_neither_built_nor_read(model, config, save, tmp_path, pixels):
    def drop_last_layer(tensors):
        for name in [n for n in tensors if ".encoder.layers.3." in n or "post_layernorm" in n or "lm_head" in n]:
            del tensors[name]

    module = build_module(config)
    assert len(module.vision_tower.encoder.layers) == 3
    assert not any("post_layernorm" in name for name, _ in module.named_parameters())
    directory = save(model, tmp_path, change=drop_last_layer)
    assert encode(load(directory, config), pixels)


def test_attend_also_gives_the_keys_and_the_layer_output(model):
    layer = model.model.vision_tower.encoder.layers[1]
    hidden = torch.randn(2, 26, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, attention, keys = attend(layer, hidden)
        torch.testing.assert_close(out, layer(hidden, attention_mask=None), rtol=1e-5, atol=1e-5)
        plain = layer.self_attn.k_proj(layer.layer_norm1(hidden))[:, 1:]
    torch.testing.assert_close(keys.transpose(1, 2).flatten(2), plain)
    assert attention.shape == (2, 25)
    assert attention.dtype == torch.float32


def test_bfloat16_stays_close_and_keeps_the_dtype(tower, model, config, save, pixels, tmp_path):
    half = load(save(model, tmp_path), config, dtype=torch.bfloat16)
    for exact, rounded in zip(encode(tower, pixels), encode(half, pixels), strict=True):
        assert rounded.embeds.dtype == rounded.encoder.dtype == rounded.keys.dtype == torch.bfloat16
        assert rounded.cls_attention.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(exact.embeds, rounded.embeds.float(), dim=-1)
        assert cosine.min() > 0.99
    assert half.token_rows([1]).dtype == torch.bfloat16
    assert half.nbytes * 2 == tower.nbytes
    assert half.num_parameters == tower.num_parameters


def test_alone_or_in_a_batch_and_in_any_input_dtype(tower, pixels):
    together = encode(tower, pixels)
    for i in range(len(pixels)):
        [alone] = encode(tower, pixels[i : i + 1].double())
        torch.testing.assert_close(alone.embeds, together[i].embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.cls_attention, together[i].cls_attention, rtol=1e-5, atol=1e-6)


def test_a_blank_image_can_be_encoded(tower):
    blank = tower.blank()
    assert blank["pixel_values"].shape == (3, 35, 35)
    [features] = tower.encode([blank])
    assert features.num_tokens == 25


def test_images_do_not_share_memory(tower, pixels):
    for features in encode(tower, pixels):
        for tensor in (features.encoder, features.embeds, features.cls_attention, features.keys):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert not tensor.requires_grad


def test_threads_get_their_own_results(tower, pixels):
    expected = [encode(tower, pixels[i : i + 1])[0].embeds for i in range(3)]
    wrong = []

    def work(i):
        for _ in range(10):
            if not torch.allclose(encode(tower, pixels[i : i + 1])[0].embeds, expected[i], atol=1e-5):
                wrong.append(i)
            tower.token_rows([i, i + 1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pixels_of_another_shape(tower):
    assert encode(tower, torch.empty(0, 3, 35, 35)) == []
    for shape in [(1, 35, 35), (1, 1, 35, 35), (1, 3, 35, 42), (1, 3, 336, 336)]:
        with pytest.raises(ValueError, match=r"expected \(3, 35, 35\)"):
            encode(tower, torch.zeros(shape))


def test_unsupported_configs(tiny_config):
    with pytest.raises(TowerError, match="'full' is not supported"):
        build_module(tiny_config(vision_feature_select_strategy="full"))
    config = tiny_config()
    config.vision_config = SiglipVisionConfig()
    with pytest.raises(TowerError, match=r"siglip_vision_model.*supported: clip_vision_model"):
        build_module(config)
    for layer in (5, -6, [1, 9], []):
        with pytest.raises(TowerError, match="expected indices in -5 to 4"):
            feature_depths(tiny_config(vision_feature_layer=layer))


def test_another_shape_than_the_config_says(model, tiny_config, save, tmp_path):
    directory = save(model, tmp_path)
    config = tiny_config()
    config.text_config.hidden_size = 64
    with pytest.raises(TowerError, match=r"embed_tokens.weight is \(100, 48\), expected \(100, 64\)"):
        load(directory, config)
    config = tiny_config()
    config.vision_config.intermediate_size = 128
    with pytest.raises(TowerError, match=r"9 tensors do not fit .*fc1.bias is \(64,\), expected \(128,\).* and 5 more"):
        load(directory, config)


def test_dummy_weights_are_those_of_the_seed(config, pixels):
    towers = [load(Path("/nonexistent"), config, load_format="dummy", seed=seed) for seed in (0, 0, 1)]
    one, same, other = (encode(tower, pixels)[0] for tower in towers)
    assert torch.equal(one.embeds, same.embeds)
    assert torch.equal(one.cls_attention, same.cls_attention)
    assert not torch.allclose(one.embeds, other.embeds)
    assert torch.linalg.matrix_rank(one.encoder - one.encoder.mean(0)) > 15, "tokens must stay distinct"
    assert 0.1 < one.embeds.std() < 10
    assert all(tower.weights == "dummy" for tower in towers)
    ids = [7, 99, 7]
    assert torch.equal(towers[0].token_rows(ids), towers[1].token_rows(list(reversed(ids))).flip(0))
    assert not torch.equal(towers[0].token_rows([7]), towers[2].token_rows([7]))
    assert not torch.equal(towers[0].token_rows([7]), towers[0].token_rows([8]))


def test_the_tower_holds_copies_not_the_mapped_file(model, config, save, tmp_path, pixels):
    directory = save(model, tmp_path)
    tower = load(directory, config)
    before = encode(tower, pixels)[0].embeds
    path = directory / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.keys()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4)
        file.write(bytes(path.stat().st_size // 2))
    assert torch.equal(encode(tower, pixels)[0].embeds, before)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("width", [4096, 5120], ids=["7b", "13b"])
def test_the_released_layout_is_consumed_exactly_once(width, naming, tmp_path):
    """Names and shapes of llava-1.5-7b-hf's and 13b-hf's vision tower, projector and token table."""
    stored = {under(NAMINGS[naming], RELEASED, name): shape for name, shape in released_clip(width).items()}
    assert len(stored) == 24 * 16 + 12
    write_sparse_shards(tmp_path, stored, shards=3)

    config = LlavaConfig(text_config=LlamaConfig(hidden_size=width, vocab_size=32064))
    expected = {name: tuple(p.shape) for name, p in build_module(config).named_parameters()}
    plan = CheckpointReader(tmp_path, ALIASES).plan(expected | {TOKEN_TABLE: (32064, width)})
    assert set(plan) == {*expected, TOKEN_TABLE}
    assert max(Counter(plan.values()).values()) == 1
    unread = set(stored) - set(plan.values())
    assert len(unread) == 16 + 2
    assert all(".layers.23." in name or ".post_layernorm." in name for name in unread)

"""The Gemma 4 checkpoints: transformers and vLLM's mapper have to read them like released ones."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Gemma4ForConditionalGeneration

from vllm_vtprune_checkpoints.gemma4 import gemma4_config, write_gemma4_checkpoint
from vllm_vtprune_evaluation.photo import photograph

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
]
PROMPT = "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\n<|image|>What is it?<turn|>\n<|turn>model\n"


@pytest.fixture(scope="module", params=[False, True], ids=["small", "large"])
def large(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def checkpoint(large: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma4_checkpoint(tmp_path_factory.mktemp("gemma4"), large=large)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    model, loading = Gemma4ForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return found


def test_a_seed_makes_the_same_weights_again(checkpoint: Path, large: bool, tmp_path: Path) -> None:
    expected = tensors(checkpoint)
    again = tensors(write_gemma4_checkpoint(tmp_path / "again", large=large, shards=3))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    other = tensors(write_gemma4_checkpoint(tmp_path / "other", large=large, seed=1))
    assert {name.rpartition(".")[2] for name, tensor in expected.items() if torch.equal(other[name], tensor)} <= {
        f"{side}_{bound}" for side in ("input", "output") for bound in ("min", "max")
    }


def released_vision(
    d: int, ff: int, layers: int, head: int, text: int, positions: int, *, large: bool
) -> dict[str, tuple[int, ...]]:
    """What `google/gemma-4-E2B-it` stores of its vision part, or `-31B-it`, in dimensions of choice."""
    tower = "model.vision_tower."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}patch_embedder.input_proj.weight": (d, 3 * 16 * 16),
        f"{tower}patch_embedder.position_embedding_table": (2, positions, d),
        "model.embed_vision.embedding_projection.weight": (text, d),
    }
    if large:
        shapes |= {f"{tower}std_bias": (d,), f"{tower}std_scale": (d,)}
    linear = {f"self_attn.{p}_proj": (d, d) for p in "qkvo"} | {"mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d)}
    linear["mlp.down_proj"] = (d, ff)
    for layer in (f"{tower}encoder.layers.{i}." for i in range(layers)):
        shapes |= {f"{layer}{name}.linear.weight": shape for name, shape in linear.items()}
        if not large:
            for bound in ("input_min", "input_max", "output_min", "output_max"):
                shapes |= {f"{layer}{name}.{bound}": () for name in linear}
        shapes |= {f"{layer}self_attn.{p}_norm.weight": (head,) for p in "qk"}
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}{norm}_layernorm.weight"] = (d,)
    return shapes


def test_weights_have_the_released_names_which_vllms_mapper_reads(checkpoint: Path, large: bool) -> None:
    served = import_module("vllm.model_executor.models.gemma4_mm").Gemma4ForConditionalGeneration
    stored = {name: tuple(tensor.shape) for name, tensor in tensors(checkpoint).items()}
    vision = released_vision(d=128, ff=256, layers=4, head=32, text=256, positions=256, large=large)
    assert {name: shape for name, shape in stored.items() if "language_model" not in name} == vision
    assert "lm_head.weight" not in stored, "tied to the embeddings"
    assert ("model.language_model.embed_tokens_per_layer.weight" in stored) is not large
    assert served.hf_to_vllm_mapper.apply_list(list(stored)) == [
        name.removeprefix("model.").replace("language_model.", "language_model.model.") for name in stored
    ]


def test_the_e2b_checkpoint_without_weights_has_the_released_shapes(tmp_path: Path) -> None:
    directory = write_gemma4_checkpoint(tmp_path, size="e2b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    assert config.text_config.sliding_window == 512
    assert config.vision_config.default_output_length == 280
    per_layer = model.get_parameter("model.language_model.embed_tokens_per_layer.weight")
    assert per_layer.shape == (262_144, 35 * 256)
    assert model.get_parameter("model.language_model.layers.34.mlp.up_proj.weight").shape == (2 * 6144, 1536)
    assert model.get_parameter("model.language_model.layers.34.self_attn.q_proj.weight").shape == (8 * 512, 1536)


def test_an_image_has_tokens_in_its_own_shape(checkpoint: Path) -> None:
    config = gemma4_config("tiny")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == PROMPT
    processor = AutoProcessor.from_pretrained(checkpoint)
    for size, rows, columns in (((512, 256), 5, 11), ((200, 400), 11, 5), ((300, 300), 8, 8)):
        inputs = processor(images=photograph().resize(size), text=PROMPT, add_special_tokens=False)
        [ids] = inputs["input_ids"]
        begin, end = ids.index(config.boi_token_id), ids.index(config.eoi_token_id)
        assert ids[begin + 1 : end] == [config.image_token_id] * (rows * columns)


def test_vllm_sees_that_the_chat_template_takes_parts(checkpoint: Path) -> None:
    hf = import_module("vllm.renderers.hf")
    template = (checkpoint / "chat_template.jinja").read_text()
    assert hf._detect_content_format(template, default="string") == "openai"


def test_the_model_looks_at_every_part_of_the_picture(checkpoint: Path, model: Any, large: bool) -> None:
    """Otherwise a test with this checkpoint could not tell a kept token from a dropped one, nor a mask from another."""
    inputs = AutoProcessor.from_pretrained(checkpoint)(
        images=photograph(), text=PROMPT, return_tensors="pt", add_special_tokens=False
    )
    ids, kinds = inputs["input_ids"], inputs.pop("mm_token_type_ids")
    places = (kinds[0] == 1).nonzero().flatten()
    with torch.inference_mode():
        [seen] = model.get_image_features(inputs["pixel_values"], inputs["image_position_ids"]).pooler_output
        causal = model(**inputs).logits[0, -1]
        both_ways = model(**inputs, mm_token_type_ids=kinds).logits[0, -1]
        assert bool((both_ways - causal).abs().max() > 0.1) is large, "of the large models alone"
        language = model.model.language_model
        embeds = language.embed_tokens(ids)
        embeds[0, places] = seen
        text_alone = ids.masked_fill(kinds == 1, 0)
        per_layer = None if large else language.get_per_layer_inputs(text_alone, None)

        def logits(tokens: torch.Tensor) -> torch.Tensor:
            rows = None if per_layer is None else per_layer[:, tokens]
            hidden = language(inputs_embeds=embeds[:, tokens], per_layer_inputs=rows).last_hidden_state
            scores = model.lm_head(hidden[0, -1])
            return 30 * torch.tanh(scores / 30)

        everything = torch.ones(ids.shape[1], dtype=torch.bool)
        torch.testing.assert_close(logits(everything), causal, rtol=0, atol=1e-4)
        for token in (0, 17, 40, 63):
            others = everything.clone()
            others[places[token]] = False
            change = (logits(others) - causal).abs().max()
            assert change > 0.01, f"dropping token {token} moves no logit by more than {change:.3f}"
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.7, "the tokens of a photograph should differ"

"""The Gemma 3 checkpoints: transformers and vLLM's mapper have to read them like released ones."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Gemma3ForConditionalGeneration

from vllm_vtprune_checkpoints.gemma3 import gemma3_config, write_gemma3_checkpoint
from vllm_vtprune_evaluation.photo import photograph

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
]
PROMPT = "<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>What is it?<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma3_checkpoint(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    model, loading = Gemma3ForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return found


def test_a_seed_makes_the_same_weights_again(checkpoint: Path, tmp_path: Path) -> None:
    expected = tensors(checkpoint)
    again = tensors(write_gemma3_checkpoint(tmp_path / "again", shards=3))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    other = tensors(write_gemma3_checkpoint(tmp_path / "other", seed=1))
    assert not any(torch.equal(other[name], tensor) for name, tensor in expected.items())


def released_vision(d: int, ff: int, layers: int, text: int, image_size: int) -> dict[str, tuple[int, ...]]:
    """What `google/gemma-3-4b-it` stores of its vision part, in dimensions of choice."""
    tower = "vision_tower.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.patch_embedding.weight": (d, 3, 14, 14),
        f"{tower}embeddings.patch_embedding.bias": (d,),
        f"{tower}embeddings.position_embedding.weight": ((image_size // 14) ** 2, d),
        f"{tower}post_layernorm.weight": (d,),
        f"{tower}post_layernorm.bias": (d,),
        "multi_modal_projector.mm_input_projection_weight": (d, text),
        "multi_modal_projector.mm_soft_emb_norm.weight": (d,),
    }
    for layer in (f"{tower}encoder.layers.{i}." for i in range(layers)):
        shapes |= {f"{layer}layer_norm{i}.{kind}": (d,) for i in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{layer}self_attn.{p}.weight": (d, d) for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
        shapes |= {f"{layer}self_attn.{p}.bias": (d,) for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
        shapes |= {f"{layer}mlp.fc1.weight": (ff, d), f"{layer}mlp.fc1.bias": (ff,)}
        shapes |= {f"{layer}mlp.fc2.weight": (d, ff), f"{layer}mlp.fc2.bias": (d,)}
    return shapes


def test_weights_have_the_released_names_which_vllms_mapper_reads(checkpoint: Path) -> None:
    served = import_module("vllm.model_executor.models.gemma3_mm").Gemma3ForConditionalGeneration
    stored = {name: tuple(tensor.shape) for name, tensor in tensors(checkpoint).items()}
    vision = released_vision(d=128, ff=256, layers=4, text=256, image_size=448)
    assert {name: shape for name, shape in stored.items() if not name.startswith("language_model.")} == vision
    assert "language_model.model.layers.2.post_feedforward_layernorm.weight" in stored
    assert "language_model.lm_head.weight" not in stored, "tied to the embeddings"
    assert served.hf_to_vllm_mapper.apply_list(list(stored)) == list(stored), "vLLM's modules are called as released"


def test_the_4b_checkpoint_without_weights_has_the_released_shapes(tmp_path: Path) -> None:
    directory = write_gemma3_checkpoint(tmp_path, size="4b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors"))
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(AutoConfig.from_pretrained(directory))
    assert sum(weight.numel() for weight in model.parameters()) == 4_300_079_472  # google/gemma-3-4b-it


def test_an_image_is_64_tokens_between_newlines(checkpoint: Path) -> None:
    config = gemma3_config("tiny")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == PROMPT
    inputs = AutoProcessor.from_pretrained(checkpoint)(images=photograph(), text=PROMPT, add_special_tokens=False)
    [ids] = inputs["input_ids"]
    begin, end = ids.index(config.boi_token_index), ids.index(config.eoi_token_index)
    assert ids[begin + 1 : end] == [config.image_token_index] * 64
    assert [ids[begin - 1], ids[end + 1]] == tokenizer.convert_tokens_to_ids(["\n\n\n\n", "\n\n"]), "newlines merge"


def test_vllm_sees_that_the_chat_template_takes_parts(checkpoint: Path) -> None:
    hf = import_module("vllm.renderers.hf")
    template = (checkpoint / "chat_template.jinja").read_text()
    assert hf._detect_content_format(template, default="string") == "openai"


def test_the_model_looks_at_every_part_of_the_picture_and_both_ways(checkpoint: Path, model: Any) -> None:
    """Otherwise a test with this checkpoint could not tell a kept token from a dropped one, nor a mask from another."""
    inputs = AutoProcessor.from_pretrained(checkpoint)(
        images=photograph(), text=PROMPT, return_tensors="pt", add_special_tokens=False
    )
    places = (inputs["token_type_ids"][0] == 1).nonzero().flatten()
    with torch.inference_mode():
        [seen] = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[0, places] = seen
        causal = model(inputs_embeds=embeds).logits[0, -1]
        assert (model(**inputs).logits[0, -1] - causal).abs().max() > 0.1, "attention both ways changes nothing"
        for token in (0, 17, 40, 63):
            others = torch.arange(embeds.shape[1]) != places[token]
            change = (model(inputs_embeds=embeds[:, others]).logits[0, -1] - causal).abs().max()
            assert change > 0.01, f"dropping token {token} moves no logit by more than {change:.3f}"
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.7, "the tokens of a photograph should differ"

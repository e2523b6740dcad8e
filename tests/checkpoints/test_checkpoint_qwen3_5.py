"""The Qwen3.5 checkpoints: transformers has to read them like released ones, and linear attention has to remember."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
)

from vllm_vtprune_checkpoints.qwen3_5 import qwen3_5_config, write_qwen3_5_checkpoint
from vllm_vtprune_evaluation.photo import photograph

PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_5_checkpoint(tmp_path_factory.mktemp("qwen3_5"), dtype="float32")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    model, loading = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def names_and_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def test_a_seed_gives_the_same_weights_and_another_seed_others(checkpoint: Path, tmp_path: Path) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()
    again = write_qwen3_5_checkpoint(tmp_path / "again", dtype="float32")
    other = write_qwen3_5_checkpoint(tmp_path / "other", dtype="float32", seed=1)
    assert (again / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights


def test_vllm_maps_every_released_tensor_to_a_name_of_its_own(checkpoint: Path) -> None:
    """Names of Qwen/Qwen3.5-9B; the second-token layer, which it holds too, is left out by vLLM."""
    qwen3_5 = import_module("vllm.model_executor.models.qwen3_5")
    layers = [f"model.language_model.layers.{layer}" for layer in range(4)]
    linear = ["A_log", "dt_bias", *(f"{part}.weight" for part in ("conv1d", "norm", "out_proj"))]
    linear += [f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]
    full = [f"{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    released = {
        *(f"{layer}.linear_attn.{part}" for layer in layers[:3] for part in linear),
        *(f"{layers[3]}.self_attn.{part}" for part in full),
        *(f"{layer}.mlp.{part}_proj.weight" for layer in layers for part in ("gate", "up", "down")),
        *(f"{layer}.{norm}_layernorm.weight" for layer in layers for norm in ("input", "post_attention")),
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
        "model.visual.pos_embed.weight",
    }
    modules = ["patch_embed.proj", *(f"merger.{part}" for part in ("norm", "linear_fc1", "linear_fc2"))]
    parts = ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2", "norm1", "norm2")
    modules += [f"blocks.{block}.{part}" for block in range(4) for part in parts]
    released |= {f"model.visual.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names = names_and_shapes(checkpoint / "model.safetensors")
    assert set(names) == released
    mapper = qwen3_5.Qwen3_5ForConditionalGeneration.hf_to_vllm_mapper
    mapped = mapper.apply_list([*names, "mtp.fc.weight"])
    assert len(set(mapped)) == len(mapped) == len(names)
    assert {name.split(".")[0] for name in mapped} == {"visual", "language_model"}
    assert names["model.language_model.layers.0.linear_attn.conv1d.weight"] == (4 * 64, 1, 4)


def test_the_9b_checkpoint_without_weights_has_the_released_shapes(tmp_path: Path) -> None:
    directory = write_qwen3_5_checkpoint(tmp_path, size="9b", weights=False)
    assert not list(directory.glob("*.safetensors*"))
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(AutoConfig.from_pretrained(directory))
    second_token = 243_290_624  # parameters of `mtp`, which transformers does not build
    assert sum(weight.numel() for weight in model.parameters()) == 9_653_104_368 - second_token  # Qwen/Qwen3.5-9B


def test_the_model_looks_at_every_part_of_the_picture(checkpoint: Path, model: Any) -> None:
    """Otherwise a test with this checkpoint could not tell a kept token from a dropped one."""
    inputs = AutoProcessor.from_pretrained(checkpoint)(images=photograph(), text=PROMPT, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 32, 32]]
    places = (inputs["input_ids"][0] == qwen3_5_config("tiny").image_token_id).nonzero().flatten()
    assert len(places) == 16 * 16
    with torch.inference_mode():
        [seen] = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[0, places] = seen
        positions = torch.arange(embeds.shape[1]).expand(3, 1, -1)

        def logits(layers: list[Any], tokens: torch.Tensor) -> torch.Tensor:
            text = model.model.language_model
            text.layers, every = torch.nn.ModuleList(layers), text.layers
            hidden = text(inputs_embeds=embeds[:, tokens], position_ids=positions[:, :, tokens], use_cache=False)
            text.layers = every
            return model.lm_head(hidden.last_hidden_state[0, -1])

        everything = torch.ones(embeds.shape[1], dtype=torch.bool)
        for layers in (list(model.model.language_model.layers), list(model.model.language_model.layers[:3])):
            whole = logits(layers, everything)
            for token in (0, 17, 150, 255):
                others = everything.clone()
                others[places[token]] = False
                change = (logits(layers, others) - whole).abs().max()
                assert change > 0.01, f"dropping token {token} moves no logit by more than {change:.4f}"
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.7, "the tokens of a photograph should differ"


@pytest.mark.parametrize(
    ("options", "thoughts"), [({}, "<think>\n"), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")]
)
def test_the_chat_template_opens_the_thoughts(checkpoint: Path, options: dict[str, bool], thoughts: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert prompt == PROMPT.removesuffix("<think>\n") + thoughts


def test_the_answer_depends_on_the_experts(tmp_path: Path) -> None:
    directory = write_qwen3_5_checkpoint(tmp_path, size="tiny-moe", dtype="float32")
    model, loading = Qwen3_5MoeForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    model.eval()
    inputs = AutoProcessor.from_pretrained(directory)(images=photograph(), text=PROMPT, return_tensors="pt")
    chosen: set[int] = set()
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, given, gives: chosen.update(gives[-1].flatten().tolist()))
    with torch.inference_mode():
        whole = model(**inputs).logits[0, -1]
        assert chosen == set(range(8)), "each expert should get tokens"
        model.model.language_model.layers[1].mlp.experts.down_proj.data[:4] = 0
        assert (model(**inputs).logits[0, -1] - whole).abs().max() > 0.01

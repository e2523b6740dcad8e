"""The Qwen3-VL checkpoints: transformers has to read them like released ones, and DeepStack has to matter."""

import json
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
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from vllm_vtprune_checkpoints.qwen3_vl import qwen3_vl_config, write_qwen3_vl_checkpoint
from vllm_vtprune_evaluation.photo import photograph

PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_vl_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    model, loading = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def test_weights_have_the_released_names(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert {
        "lm_head.weight",
        "model.language_model.layers.2.self_attn.q_norm.weight",
        "model.visual.blocks.3.mlp.linear_fc1.bias",
        "model.visual.deepstack_merger_list.1.norm.weight",
        "model.visual.merger.linear_fc2.weight",
        "model.visual.pos_embed.weight",
    } <= names
    assert names == set(model.state_dict())
    with safe_open(write_qwen3_vl_checkpoint(tmp_path, tied=True) / "model.safetensors", "pt") as tensors:
        assert names - set(tensors.keys()) == {"lm_head.weight"}


def test_the_4b_checkpoint_without_weights_has_the_released_shapes(tmp_path: Path) -> None:
    directory = write_qwen3_vl_checkpoint(tmp_path, size="4b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors*"))
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(directory))
    assert sum(weight.numel() for weight in model.parameters()) == 4_437_815_808  # Qwen/Qwen3-VL-4B-Instruct


def test_the_processors_take_the_released_sizes(checkpoint: Path) -> None:
    written = json.loads((checkpoint / "preprocessor_config.json").read_text())
    assert (written["patch_size"], written["temporal_patch_size"], written["merge_size"]) == (16, 2, 2)
    assert written["image_mean"] == written["image_std"] == [0.5, 0.5, 0.5]
    inputs = AutoProcessor.from_pretrained(checkpoint)(images=photograph(), text=PROMPT, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 32, 32]]
    assert int((inputs["input_ids"] == qwen3_vl_config("tiny").image_token_id).sum()) == 16 * 16


def test_the_model_looks_at_every_part_of_the_picture_and_at_deepstack(checkpoint: Path, model: Any) -> None:
    """Otherwise a test with this checkpoint could not tell a kept token from a dropped one, nor its deeper features."""
    inputs = AutoProcessor.from_pretrained(checkpoint)(images=photograph(), text=PROMPT, return_tensors="pt")
    places = inputs["input_ids"] == model.config.image_token_id
    with torch.inference_mode():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        [seen] = features.pooler_output
        deepstack = torch.stack([rows for [rows] in features.deepstack_features])
        assert len(deepstack) == 2
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[places] = seen
        positions = torch.arange(embeds.shape[1]).expand(3, 1, -1)

        def logits(tokens: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
            hidden = model.model.language_model(
                inputs_embeds=embeds[:, tokens],
                position_ids=positions[:, :, tokens],
                visual_pos_masks=places[:, tokens],
                deepstack_visual_embeds=list(levels[:, tokens[places[0]]]),
            ).last_hidden_state
            return model.lm_head(hidden[0, -1])

        everything = torch.ones(embeds.shape[1], dtype=torch.bool)
        whole = logits(everything, deepstack)
        for token in (0, 17, 150, 255):
            others = everything.clone()
            others[places[0].nonzero()[token]] = False
            change = (logits(others, deepstack) - whole).abs().max()
            assert change > 0.01, f"dropping token {token} moves no logit by more than {change:.3f}"
        for level in range(2):
            others = deepstack.clone()
            others[level] = others[level].roll(1, dims=0)
            assert (logits(everything, others) - whole).abs().max() > 0.01, f"level {level}"
    for rows in (seen, *deepstack):
        similarity = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        assert similarity.mean() < 0.7, "the tokens of a photograph should differ"


def test_the_chat_template_adds_no_system_turn(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == PROMPT


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_vl_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), size="tiny-moe")


def test_files_hold_experts_as_released_and_vllm_maps_every_tensor(experts: Path, tmp_path: Path) -> None:
    """The matrices of experts lie transposed in released files, and in transformers' modules do not."""
    model, loading = Qwen3VLMoeForConditionalGeneration.from_pretrained(experts, output_loading_info=True)
    assert not any(loading.values()), loading
    mlp = "model.language_model.layers.2.mlp"
    with safe_open(experts / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        gate_up, down = (tensors.get_tensor(f"{mlp}.experts.{part}_proj") for part in ("gate_up", "down"))
        assert tensors.get_slice(f"{mlp}.gate.weight").get_shape() == [8, 256]
    assert (gate_up.shape, down.shape) == ((8, 256, 2 * 64), (8, 64, 256))
    assert torch.equal(model.state_dict()[f"{mlp}.experts.gate_up_proj"], gate_up.transpose(1, 2))
    assert names == set(model.state_dict())
    again = write_qwen3_vl_checkpoint(tmp_path / "again", size="tiny-moe")
    assert (again / "model.safetensors").read_bytes() == (experts / "model.safetensors").read_bytes()
    mapper = import_module(
        "vllm.model_executor.models.qwen3_vl_moe"
    ).Qwen3VLMoeForConditionalGeneration.hf_to_vllm_mapper
    mapped = mapper.apply_list(sorted(names))
    assert len(set(mapped)) == len(mapped) == len(names)
    assert {name.split(".")[0] for name in mapped} == {"visual", "language_model"}


def test_the_answer_depends_on_the_experts(experts: Path) -> None:
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(experts).eval()
    inputs = AutoProcessor.from_pretrained(experts)(images=photograph(), text=PROMPT, return_tensors="pt")
    chosen: set[int] = set()
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, given, gives: chosen.update(gives[-1].flatten().tolist()))
    with torch.inference_mode():
        whole = model(**inputs).logits[0, -1]
        assert chosen == set(range(8)), "each expert should get tokens"
        model.model.language_model.layers[1].mlp.experts.down_proj.data[:4] = 0
        assert (model(**inputs).logits[0, -1] - whole).abs().max() > 0.01


def test_the_30b_checkpoint_without_weights_has_the_released_shapes(tmp_path: Path) -> None:
    directory = write_qwen3_vl_checkpoint(tmp_path, size="30b-a3b", weights=False, dtype="bfloat16")
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(AutoConfig.from_pretrained(directory))
    assert sum(weight.numel() for weight in model.parameters()) == 31_070_754_032  # Qwen/Qwen3-VL-30B-A3B-Instruct

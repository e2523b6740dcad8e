"""What checkpoints of single families have beside: their prompts, shapes of images, masks, experts and layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from vllm.model_executor.models.internvl import InternVLChatModel
from vllm.transformers_utils.config import get_config

from vllm_vtprune_checkpoints import write_checkpoint
from vllm_vtprune_checkpoints.internvl_chat import NAMES
from vllm_vtprune_checkpoints.writing import released
from vllm_vtprune_evaluation.photo import photograph

IMAGE, VIDEO, WHAT = {"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Writes each checkpoint once."""
    return cache(lambda family, **options: write_checkpoint(family, tmp_path_factory.mktemp(family), **options))


def read(directory: Path, messages: Sequence[Any] = ({"role": "user", "content": [IMAGE, WHAT]},)) -> tuple[Any, Any]:
    """A model, and its inputs for the photograph."""
    processor = AutoProcessor.from_pretrained(directory)
    prompt = processor.apply_chat_template(list(messages), add_generation_prompt=True)
    inputs = processor(images=photograph(), text=prompt, return_tensors="pt", add_special_tokens=False)
    return AutoModelForImageTextToText.from_pretrained(directory), inputs


@pytest.mark.parametrize(
    ("family", "content", "options", "prompt"),
    [
        ("llava", [WHAT, IMAGE, WHAT, IMAGE], {}, "USER: <image>\n<image>\nWhat? What? ASSISTANT:"),
        ("llava", [{"type": "image_url", "image_url": {"url": "x"}}, WHAT], {}, "USER: <image>\nWhat? ASSISTANT:"),
        (
            "llava_onevision",
            [WHAT, VIDEO, IMAGE],
            {},
            "<|im_start|>user <image><video>\nWhat?<|im_end|><|im_start|>assistant\n",
        ),
        (
            "qwen2_5_vl",
            [WHAT, VIDEO],
            {},
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "What?<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3_5",
            [WHAT],
            {"enable_thinking": False},
            "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        ("internvl_chat", [IMAGE, WHAT], {}, "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_prompts(
    family: str, content: list[Any], options: dict[str, Any], prompt: str, checkpoint: Checkpoints
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    messages = [{"role": "user", "content": content}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options) == prompt


@pytest.mark.parametrize(
    ("family", "size", "tokens"),
    [
        pytest.param("llava_onevision", (50, 50), 16 + 4 * (4 + 1), id="one square"),
        pytest.param("llava_onevision", (60, 300), 16 + 20 * (4 + 1), id="five squares"),
        pytest.param("llava_onevision", (200, 60), 16 + 4 * (14 + 1), id="padding taken off"),
        pytest.param("llava_onevision", (512, 512), 16 + 12 * (12 + 1), id="36 squares scaled down to 9"),
        ("gemma4", (512, 256), 5 * 11),
        ("gemma4", (200, 400), 11 * 5),
        ("mistral3", (300, 180), 11 * 7),
    ],
)
def test_tokens_of_an_image(family: str, size: tuple[int, int], tokens: int, checkpoint: Checkpoints) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    inputs = processor(images=photograph().resize(size), text=processor.image_token)
    assert sum(int(token) == processor.image_token_id for token in inputs["input_ids"][0]) == tokens


def test_gemma_3_puts_an_image_between_newlines_that_merge(checkpoint: Checkpoints) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint("gemma3"))
    [ids] = processor(images=photograph(), text="Be brief.\n\n<start_of_image>What?")["input_ids"]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    begin, end = tokens.index("<start_of_image>"), tokens.index("<end_of_image>")
    assert [tokens[begin - 1], tokens[end + 1]] == ["\n\n\n\n", "\n\n"]


def test_mistral_ends_each_row_with_a_token(checkpoint: Checkpoints) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint("mistral3"))
    inputs = processor(images=photograph().resize((300, 180)), text="[IMG]", add_special_tokens=False)
    rows = (["[IMG]"] * 11 + ["[IMG_BREAK]"]) * 7
    assert processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == [*rows[:-1], "[IMG_END]"]


@pytest.mark.parametrize(
    ("family", "options", "kinds", "both_ways"),
    [
        ("gemma3", {}, "token_type_ids", True),
        ("gemma4", {}, "mm_token_type_ids", False),
        ("gemma4", {"large": True}, "mm_token_type_ids", True),
    ],
)
def test_attention_in_both_directions_matters(
    family: str, options: dict[str, Any], kinds: str, both_ways: bool, checkpoint: Checkpoints
) -> None:
    model, inputs = read(checkpoint(family, **options))
    with torch.inference_mode():
        whole = model(**inputs).logits[0, -1]
        change = (model(**{**inputs, kinds: torch.zeros_like(inputs[kinds])}).logits[0, -1] - whole).abs().max()
    assert bool(change > 0.1) is both_ways


def test_qwen3_vl_s_deepstack_matters(checkpoint: Checkpoints) -> None:
    model, inputs = read(checkpoint("qwen3_vl"))
    with torch.inference_mode():
        whole = model(**inputs).logits[0, -1]
        for merger in model.model.visual.deepstack_merger_list:
            shift = merger.register_forward_hook(lambda module, args, rows: rows.roll(1, dims=0))
            assert (model(**inputs).logits[0, -1] - whole).abs().max() > 0.01
            shift.remove()


def test_qwen3_5_s_linear_attention_remembers_each_token(checkpoint: Checkpoints) -> None:
    model, inputs = read(checkpoint("qwen3_5", dtype="float32"))
    text = model.model.language_model
    text.layers = torch.nn.ModuleList(list(text.layers)[:3])  # the fourth is of full attention
    [places] = (inputs["input_ids"][0] == model.config.image_token_id).nonzero(as_tuple=True)
    embed = model.get_input_embeddings()
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)

    def logits(dropped: int | None) -> torch.Tensor:
        kept = torch.arange(embeds.shape[1]) != (-1 if dropped is None else places[dropped])
        hidden = text(inputs_embeds=embeds[:, kept], position_ids=positions[:, :, kept], use_cache=False)
        return model.lm_head(hidden.last_hidden_state[0, -1])

    with torch.inference_mode():
        embeds = embed(inputs["input_ids"])
        [embeds[0, places]] = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        whole = logits(None)
        for token in (0, 17, 150, 255):
            assert (logits(token) - whole).abs().max() > 0.01, token


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_the_answer_depends_on_the_experts(family: str, checkpoint: Checkpoints) -> None:
    model, inputs = read(checkpoint(family, size="tiny-moe", dtype="float32"))
    chosen: set[int] = set()
    layers = model.model.language_model.layers
    for layer in layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, outputs: chosen.update(outputs[-1].flatten().tolist()))
    with torch.inference_mode():
        whole = model(**inputs).logits[0, -1]
        assert chosen == set(range(8)), "each expert should get tokens"
        layers[1].mlp.experts.down_proj.data[:4] = 0
        assert (model(**inputs).logits[0, -1] - whole).abs().max() > 0.01


def test_files_of_qwen3_vl_hold_the_matrices_of_experts_transposed(checkpoint: Checkpoints) -> None:
    directory = checkpoint("qwen3_vl", size="tiny-moe", dtype="float32")
    experts = "model.language_model.layers.2.mlp.experts"
    tensors, model = load_file(directory / "model.safetensors"), AutoModelForImageTextToText.from_pretrained(directory)
    assert tensors[f"{experts}.gate_up_proj"].shape == (8, 256, 2 * 64)
    assert tensors[f"{experts}.down_proj"].shape == (8, 64, 256)
    assert torch.equal(model.state_dict()[f"{experts}.gate_up_proj"], tensors[f"{experts}.gate_up_proj"].mT)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["1B", "38B"])
def test_internvl_in_its_authors_layout_holds_the_weights_of_transformers(
    qk_norm: bool, checkpoint: Checkpoints
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint("internvl", image_size=112, qk_norm=qk_norm))
    tensors = load_file(checkpoint("internvl_chat", qk_norm=qk_norm) / "model.safetensors")
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(released(name, NAMES), []).append(tensor)
    assert tensors.keys() == parts.keys()
    assert all(torch.equal(tensor, torch.cat(parts[name])) for name, tensor in tensors.items())
    assert InternVLChatModel.hf_to_vllm_mapper.apply_list(list(tensors)) == list(tensors), "vLLM's modules' names"


@pytest.mark.parametrize("qk_norm", [False, True], ids=["1B", "38B"])
def test_internvl_in_its_authors_layout_has_the_released_tensors(qk_norm: bool, checkpoint: Checkpoints) -> None:
    """As OpenGVLab/InternVL3-1B and -38B have them, beside the language model."""
    linear = "attn.qkv attn.proj mlp.fc1 mlp.fc2 norm1 norm2".split()
    layer = {f"{module}.{kind}" for module in linear for kind in ("weight", "bias")} | {"ls1", "ls2"}
    if qk_norm:
        layer = layer - {"attn.qkv.bias", "norm1.bias", "norm2.bias"} | {"attn.q_norm.weight", "attn.k_norm.weight"}
    names = {f"vision_model.encoder.layers.N.{name}" for name in layer}
    names |= {f"mlp1.{index}.{kind}" for index in (0, 1, 3) for kind in ("weight", "bias")}
    embeddings = "class_embedding position_embedding patch_embedding.weight patch_embedding.bias".split()
    names |= {f"vision_model.embeddings.{name}" for name in embeddings}
    tensors = load_file(checkpoint("internvl_chat", qk_norm=qk_norm) / "model.safetensors")
    assert {re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in tensors if "language_model" not in name} == names
    assert tensors["vision_model.encoder.layers.3.attn.qkv.weight"].shape == (3 * 128, 128)


def test_vllm_reads_internvl_s_configuration_by_the_code_in_the_checkpoint(tmp_path: Path) -> None:
    directory = write_checkpoint("internvl_chat", tmp_path, size="1b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors"))
    config: Any = get_config(str(directory), trust_remote_code=True)
    assert config.model_type == "internvl_chat"
    assert config.dtype == torch.bfloat16
    assert (config.force_image_size, config.vision_config.image_size, config.downsample_ratio) == (448, 448, 0.5)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    text = config.get_text_config()
    assert (text.model_type, text.hidden_size, text.num_hidden_layers) == ("qwen2", 896, 24)


def test_internvl_s_tokenizer_knows_no_image_token(checkpoint: Checkpoints) -> None:
    directory = checkpoint("internvl_chat")
    assert len(AutoTokenizer.from_pretrained(directory).encode("<image>")) > 1
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"] for token in tokens if token["special"]}
    assert {"<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>"} <= special

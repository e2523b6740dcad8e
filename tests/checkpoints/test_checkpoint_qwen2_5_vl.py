"""The Qwen2.5-VL checkpoints: transformers and vLLM's chat templating have to read them like released ones."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vllm_vtprune_checkpoints.llava import tiny_checkpoint
from vllm_vtprune_checkpoints.qwen2_5_vl import qwen2_5_vl_config, write_qwen2_5_vl_checkpoint
from vllm_vtprune_evaluation.photo import photograph


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_5_vl_checkpoint(tmp_path_factory.mktemp("qwen"))


def load(directory: Path) -> Qwen2_5_VLForConditionalGeneration:
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert {kind: list(names) for kind, names in loading.items() if names} == {}
    return model.eval()


def names_in(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert names.isdisjoint(tensors.keys()), "a tensor is in two shards"
            names |= set(tensors.keys())
    return names


@pytest.mark.parametrize(("naming", "shards"), [("vllm", 3), ("module", 1)])
def test_transformers_reads_the_same_model_from_every_naming(
    checkpoint: Path, naming: Any, shards: int, tmp_path: Path
) -> None:
    written = write_qwen2_5_vl_checkpoint(tmp_path, naming=naming, shards=shards)
    expected, found = load(checkpoint).state_dict(), load(written).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_namings_are_the_ones_found_in_the_wild(checkpoint: Path, tmp_path: Path) -> None:
    released = {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.norm.weight",
        "visual.blocks.3.attn.qkv.weight",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.2.bias",
        "visual.patch_embed.proj.weight",
    }
    assert released <= names_in(checkpoint)
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    assert names_in(tmp_path / "saved") == names_in(checkpoint)
    module = write_qwen2_5_vl_checkpoint(tmp_path / "module", naming="module")
    assert names_in(module) == set(model.state_dict())
    tied = write_qwen2_5_vl_checkpoint(tmp_path / "tied", tied=True)
    assert names_in(checkpoint) - names_in(tied) == {"lm_head.weight"}
    assert AutoConfig.from_pretrained(tied).tie_word_embeddings


def test_the_3b_checkpoint_without_weights_has_the_released_shapes(tmp_path: Path) -> None:
    directory = write_qwen2_5_vl_checkpoint(tmp_path, size="3b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors*"))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(directory))
    assert sum(weight.numel() for weight in model.parameters()) == 3_754_622_976  # Qwen/Qwen2.5-VL-3B-Instruct


def test_the_image_processor_takes_the_released_sizes(checkpoint: Path) -> None:
    written = json.loads((checkpoint / "preprocessor_config.json").read_text())
    assert (written["patch_size"], written["temporal_patch_size"], written["merge_size"]) == (14, 2, 2)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    inputs = processor(images=photograph(), text="<|image_pad|>", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 36, 36]]
    assert int((inputs["input_ids"] == qwen2_5_vl_config("tiny").image_token_id).sum()) == 18 * 18


def test_the_model_looks_at_every_part_of_the_picture(checkpoint: Path) -> None:
    """Otherwise a test with this checkpoint could not tell a kept token from a dropped one."""
    model, processor = load(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    inputs = processor(images=photograph(), text=prompt, return_tensors="pt")
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    with torch.inference_mode():
        [seen] = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[0, places] = seen
        positions = torch.arange(embeds.shape[1]).expand(3, 1, -1)
        whole = model(inputs_embeds=embeds, position_ids=positions).logits[0, -1]
        for token in (0, 17, 150, 323):
            others = torch.arange(embeds.shape[1]) != places[token]
            logits = model(inputs_embeds=embeds[:, others], position_ids=positions[:, :, others]).logits[0, -1]
            change = (logits - whole).abs().max()
            assert change > 0.01, f"dropping token {token} moves no logit by more than {change:.3f}"
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.7, "the tokens of a photograph should differ"


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "This: "}, {"type": "video"}]},
                {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": "Its color?"},
            ],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
            "This: <|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
            "<|im_start|>user\nIts color?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_chat_template_has_the_released_form(checkpoint: Path, messages: list[Any], prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    ids = tokenizer.encode(prompt)
    assert tokenizer.decode(ids) == prompt
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_vllm_sees_that_the_chat_template_takes_parts(checkpoint: Path) -> None:
    hf = import_module("vllm.renderers.hf")
    template = (checkpoint / "chat_template.jinja").read_text()
    assert hf._detect_content_format(template, default="string") == "openai"


def test_each_family_has_a_tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for family, architecture in (
        ("llava", "LlavaForConditionalGeneration"),
        ("llava_next", "LlavaNextForConditionalGeneration"),
        ("internvl", "InternVLForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    ):
        assert AutoConfig.from_pretrained(tiny_checkpoint(family)).architectures == [architecture]

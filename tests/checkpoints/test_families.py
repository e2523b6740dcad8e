"""Checkpoints of every family: transformers reads them like released ones, and each token of an image counts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.support.engines import TOLERANCE
from tests.support.samples import fifth
from vllm_vtprune_checkpoints import FAMILIES, write_checkpoint
from vllm_vtprune_checkpoints.writing import Checkpoint, Writer, released
from vllm_vtprune_evaluation.photo import photograph

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": [{"type": "text", "text": "Its color?"}]},
]


def chatml(image: str) -> str:
    return (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image}What?<|im_end|>\n<|im_start|>assistant\n"
        "A cat.<|im_end|>\n<|im_start|>user\nIts color?<|im_end|>\n<|im_start|>assistant\n"
    )


@dataclass(frozen=True)
class Row:
    """A checkpoint that transformers has classes for.

    Attributes:
        prompt: `MESSAGES` in the released form.
        tokens: of the photograph, 512 x 512.
        size: the one with released shapes.
        shapes: some of the released tensors.
        parameters: of the released checkpoint, where they were counted.
        options: of the maker.
        alike: mean cosine of two tokens of the photograph at most.
    """

    prompt: str
    tokens: int
    size: str
    shapes: Mapping[str, tuple[int, ...]]
    parameters: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    alike: float = 0.7


LLAVA = Row(
    "Be brief. USER: <image>\nWhat? ASSISTANT: A cat. USER: Its color? ASSISTANT:",
    576,
    "7b",
    {
        "language_model.lm_head.weight": (32064, 4096),
        "language_model.model.layers.31.mlp.gate_proj.weight": (11008, 4096),
        "multi_modal_projector.linear_2.bias": (4096,),
        "vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.weight": (1024, 1024),
        "vision_tower.vision_model.pre_layrnorm.weight": (1024,),
    },
    7_063_427_072,  # llava-hf/llava-1.5-7b-hf
)
GLM4V = Row(
    "[gMASK]<sop><|system|>\nBe brief.<|user|>\n<|begin_of_image|><|image|><|end_of_image|>What?<|assistant|>\nA cat."
    "<|user|>\nIts color?<|assistant|>\n",
    12 * 12,
    "released",
    {
        "lm_head.weight": (151_552, 4096),
        "model.language_model.layers.39.mlp.gate_up_proj.weight": (2 * 13_696, 4096),
        "model.language_model.layers.39.self_attn.k_proj.bias": (2 * 128,),
        "model.visual.blocks.23.attn.qkv.weight": (3 * 1536, 1536),
        "model.visual.blocks.23.mlp.gate_proj.weight": (4096, 1536),
        "model.visual.downsample.bias": (4096,),
        "model.visual.embeddings.position_embedding.weight": (24 * 24, 1536),
        "model.visual.merger.post_projection_norm.bias": (4096,),
    },
    10_292_777_472,  # zai-org/GLM-4.1V-9B-Thinking
)
GEMMA4 = Row(
    "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\n<|image|>What?<turn|>\n<|turn>model\nA cat.<turn|>\n"
    "<|turn>user\nIts color?<turn|>\n<|turn>model\n",
    8 * 8,
    "e2b",
    {
        "model.embed_vision.embedding_projection.weight": (1536, 768),
        "model.language_model.embed_tokens_per_layer.weight": (262_144, 35 * 256),
        "model.language_model.layers.34.mlp.up_proj.weight": (2 * 6144, 1536),
        "model.language_model.layers.34.self_attn.q_proj.weight": (8 * 512, 1536),
        "model.vision_tower.encoder.layers.15.mlp.down_proj.input_max": (),
        "model.vision_tower.encoder.layers.15.self_attn.q_proj.linear.weight": (768, 768),
        "model.vision_tower.patch_embedder.position_embedding_table": (2, 10_240, 768),
    },
)
QWEN3_VL = Row(
    chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    16 * 16,
    "4b",
    {
        "model.language_model.layers.35.self_attn.q_norm.weight": (128,),
        "model.visual.blocks.23.mlp.linear_fc1.bias": (4096,),
        "model.visual.deepstack_merger_list.2.norm.weight": (4096,),
        "model.visual.merger.linear_fc2.weight": (2560, 4096),
        "model.visual.pos_embed.weight": (48 * 48, 1024),
    },
    4_437_815_808,  # Qwen/Qwen3-VL-4B-Instruct
)
QWEN3_5 = Row(
    chatml("<|vision_start|><|image_pad|><|vision_end|>") + "<think>\n",
    16 * 16,
    "9b",
    {
        "lm_head.weight": (248_320, 4096),
        "model.language_model.layers.0.linear_attn.A_log": (32,),
        "model.language_model.layers.0.linear_attn.conv1d.weight": (2 * 16 * 128 + 32 * 128, 1, 4),
        "model.language_model.layers.0.linear_attn.in_proj_qkv.weight": (2 * 16 * 128 + 32 * 128, 4096),
        "model.language_model.layers.31.self_attn.q_proj.weight": (2 * 16 * 256, 4096),
        "model.visual.merger.linear_fc1.bias": (4608,),
        "model.visual.pos_embed.weight": (48 * 48, 1152),
    },
    9_653_104_368 - 243_290_624,  # Qwen/Qwen3.5-9B without `mtp`, which transformers does not build
    {"dtype": "float32"},
)
ROWS = {
    "llava": LLAVA,
    "llava with SigLIP": replace(LLAVA, shapes={}, parameters=None, options={"siglip": True}),
    "llava_next": replace(
        LLAVA,
        tokens=8 * 8 + 16 * (16 + 1),
        shapes=LLAVA.shapes | {"image_newline": (4096,)},
        parameters=None,
        options={"image_size": 112},
    ),
    "llava_onevision": Row(
        "<|im_start|>system \nBe brief.<|im_end|><|im_start|>user <image>\nWhat?<|im_end|><|im_start|>assistant \n"
        "A cat.<|im_end|><|im_start|>user \nIts color?<|im_end|><|im_start|>assistant\n",
        16 + 12 * (12 + 1),
        "0.5b",
        {
            "image_newline": (896,),
            "language_model.model.embed_tokens.weight": (152_000, 896),
            "multi_modal_projector.linear_1.weight": (896, 1152),
            "vision_tower.vision_model.embeddings.position_embedding.weight": (27 * 27, 1152),
            "vision_tower.vision_model.encoder.layers.25.mlp.fc2.weight": (1152, 4304),
            "vision_tower.vision_model.post_layernorm.bias": (1152,),
        },
        alike=0.75,
    ),
    "internvl": Row(
        chatml("<IMG_CONTEXT>\n"),
        (9 + 1) * 4 * 4,
        "1b",
        {
            "language_model.lm_head.weight": (151_674, 896),
            "multi_modal_projector.layer_norm.bias": (4 * 1024,),
            "multi_modal_projector.linear_1.weight": (896, 4 * 1024),
            "vision_tower.embeddings.cls_token": (1, 1, 1024),
            "vision_tower.embeddings.patch_embeddings.projection.bias": (1024,),
            "vision_tower.embeddings.position_embeddings": (1, 32 * 32 + 1, 1024),
            "vision_tower.encoder.layer.23.attention.projection_layer.weight": (1024, 1024),
            "vision_tower.encoder.layer.23.attention.q_proj.bias": (1024,),
            "vision_tower.encoder.layer.23.lambda_1": (1024,),
            "vision_tower.encoder.layer.23.layernorm_before.weight": (1024,),
        },
        options={"image_size": 112},
    ),
    "glm4v": GLM4V,
    "glm4v with experts": replace(
        GLM4V,
        shapes={"model.language_model.layers.45.mlp.experts.127.up_proj.weight": (1408, 4096)},
        parameters=107_710_933_120,  # zai-org/GLM-4.5V
        options={"moe": True},
    ),
    "gemma3": Row(
        "<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\nA cat."
        "<end_of_turn>\n<start_of_turn>user\nIts color?<end_of_turn>\n<start_of_turn>model\n",
        64,
        "4b",
        {
            "language_model.model.layers.33.post_feedforward_layernorm.weight": (2560,),
            "multi_modal_projector.mm_input_projection_weight": (1152, 2560),
            "multi_modal_projector.mm_soft_emb_norm.weight": (1152,),
            "vision_tower.vision_model.embeddings.position_embedding.weight": (64 * 64, 1152),
            "vision_tower.vision_model.encoder.layers.26.self_attn.out_proj.weight": (1152, 1152),
        },
        4_300_079_472,  # google/gemma-3-4b-it
    ),
    "gemma4": GEMMA4,
    "gemma4 as a large one": replace(GEMMA4, shapes={"model.vision_tower.std_scale": (768,)}, options={"large": True}),
    "idefics3": Row(
        "<|im_start|>System: Be brief.<end_of_utterance>\nUser:<image>What?<end_of_utterance>\nAssistant: A cat."
        "<end_of_utterance>\nUser: Its color?<end_of_utterance>\nAssistant:",
        (16 + 1) * 3 * 3,
        "2b",
        {
            "lm_head.weight": (49_155, 2048),
            "model.connector.modality_projection.proj.weight": (2048, 9 * 1152),
            "model.text_model.layers.23.mlp.gate_proj.weight": (8192, 2048),
            "model.vision_model.embeddings.position_embedding.weight": (27 * 27, 1152),
            "model.vision_model.encoder.layers.26.self_attn.out_proj.bias": (1152,),
        },
    ),
    "mistral3": Row(
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST][IMG]What?[/INST]A cat.</s>[INST]Its color?[/INST]",
        12 * 12,
        "24b",
        {
            "language_model.lm_head.weight": (131_072, 5120),
            "language_model.model.layers.39.self_attn.q_proj.weight": (4096, 5120),
            "multi_modal_projector.norm.weight": (1024,),
            "multi_modal_projector.patch_merger.merging_layer.weight": (1024, 4096),
            "vision_tower.ln_pre.weight": (1024,),
            "vision_tower.patch_conv.weight": (1024, 3, 14, 14),
            "vision_tower.transformer.layers.23.attention.o_proj.weight": (1024, 1024),
        },
        24_011_361_280,  # mistralai/Mistral-Small-3.1-24B-Instruct-2503
    ),
    "qwen2_5_vl": Row(
        chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        18 * 18,
        "3b",
        {
            "model.embed_tokens.weight": (151_936, 2048),
            "model.layers.35.self_attn.q_proj.bias": (2048,),
            "model.norm.weight": (2048,),
            "visual.blocks.31.attn.qkv.weight": (3 * 1280, 1280),
            "visual.merger.ln_q.weight": (1280,),
            "visual.merger.mlp.2.bias": (2048,),
            "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        },
        3_754_622_976,  # Qwen/Qwen2.5-VL-3B-Instruct
    ),
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl with experts": replace(
        QWEN3_VL,
        size="30b-a3b",
        shapes={"model.language_model.layers.47.mlp.gate.weight": (128, 2048)},
        parameters=31_070_754_032,  # Qwen/Qwen3-VL-30B-A3B-Instruct
        options={"size": "tiny-moe"},
    ),
    "qwen3_5": QWEN3_5,
    "qwen3_5 with experts": replace(QWEN3_5, options={"size": "tiny-moe", "dtype": "float32"}),
}


def test_every_family_is_here() -> None:
    """InternVL's own layout, for which transformers has no classes, has a test of its own."""
    assert {name.split()[0] for name in ROWS} == set(FAMILIES) - {"internvl_chat"}


@pytest.fixture(scope="module", params=ROWS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def row(name: str) -> Row:
    return ROWS[name]


def write(name: str, directory: Path, **options: Any) -> Path:
    return write_checkpoint(name.split()[0], directory, **ROWS[name].options, **options)


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(name, tmp_path_factory.mktemp("checkpoint"))


def test_transformers_uses_every_weight_and_looks_at_every_token(checkpoint: Path, row: Row) -> None:
    """Otherwise a test with this checkpoint could not tell a kept token from a dropped one, within its tolerance."""
    model: Any
    model, loading = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(checkpoint)
    prompt = processor.apply_chat_template(MESSAGES[1:2], add_generation_prompt=True)
    inputs = processor(images=photograph(), text=prompt, return_tensors="pt", add_special_tokens=False)
    config = model.config
    image_token = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
    places = (inputs["input_ids"][0] == image_token).nonzero().flatten()
    assert len(places) == row.tokens
    pixels = {name: inputs[name] for name in inspect.signature(model.get_image_features).parameters if name in inputs}
    if "image_grid_thw" in inputs:  # else positions would follow from the tokens that are attended to
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with torch.inference_mode():
        seen = torch.cat(tuple(model.get_image_features(**pixels).pooler_output))
        whole = model(**inputs).logits[0, -1]
        for token in {0, 17 % row.tokens, row.tokens - 2}:
            mask = torch.ones_like(inputs["input_ids"])
            mask[0, places[token]] = 0
            change = (model(**{**inputs, "attention_mask": mask}).logits[0, -1] - whole).abs().max()
            assert change > TOLERANCE, f"hiding token {token} moves no logit by more than {change:.4f}"
    unit = torch.nn.functional.normalize(seen, dim=-1)
    assert (unit @ unit.T).mean() < row.alike, "the tokens of a photograph should differ"


@pytest.mark.parametrize("name", fifth(ROWS), indirect=True, scope="module")
def test_a_seed_gives_the_same_files_and_another_seed_others(checkpoint: Path, name: str, tmp_path: Path) -> None:
    again, other = write(name, tmp_path / "again"), write(name, tmp_path / "other", seed=1)
    assert {file.name for file in again.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name
        same = file.read_bytes() == (other / file.name).read_bytes()
        assert same == (file.name != "model.safetensors"), file.name


def test_the_chat_template_has_the_released_form(checkpoint: Path, row: Row) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == row.prompt
    template = (checkpoint / "chat_template.jinja").read_text()
    hf = import_module("vllm.renderers.hf")
    assert hf._detect_content_format(template, default="string") == "openai", "vLLM sees that it takes parts"


def test_tensors_have_the_released_names_and_shapes(name: str, row: Row) -> None:
    family = name.split()[0]
    writer: Writer = getattr(import_module(f"vllm_vtprune_checkpoints.{family}"), f"write_{family}_checkpoint")
    others = {option: value for option, value in row.options.items() if option in ("moe", "large", "siglip")}
    checkpoint: Checkpoint = writer.make(row.size, **others)
    shapes = {released(tensor, checkpoint.names): shape for tensor, shape in checkpoint.shapes().items()}
    assert row.shapes.items() <= shapes.items()
    if row.parameters is not None:
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == row.parameters

"""The Mistral-Small-3.1 checkpoints: transformers and vLLM have to read them like released ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Mistral3ForConditionalGeneration
from vllm.model_executor.models.mistral3 import Mistral3ForConditionalGeneration as Served

from vllm_vtprune_checkpoints.directories import shapes_of
from vllm_vtprune_checkpoints.mistral3 import RELEASED, TOKEN_ID, mistral3_config, write_mistral3_checkpoint
from vllm_vtprune_checkpoints.weights import renamed
from vllm_vtprune_evaluation.photo import photograph

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
PROMPT = "<s>[INST][IMG]What is it?[/INST]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mistral3_checkpoint(tmp_path_factory.mktemp("mistral3"))


def test_transformers_uses_every_weight_and_looks_at_every_token(checkpoint: Path) -> None:
    model: Any
    model, loading = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.apply_chat_template(MESSAGES, tokenize=False) == PROMPT
    inputs = processor(images=photograph().resize((300, 180)), text=PROMPT, add_special_tokens=False)
    image, row_end, end = (TOKEN_ID[token] for token in ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    rows = ([image] * 11 + [row_end]) * 7
    assert inputs["input_ids"][0, 2 : 2 + 7 * 12].tolist() == [*rows[:-1], end]
    places = (inputs["input_ids"][0] == image).nonzero().flatten()
    with torch.inference_mode():
        [seen] = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[0, places] = seen
        whole = model(inputs_embeds=embeds).logits[0, -1]
        for token in (0, 17, 76):
            others = torch.arange(embeds.shape[1]) != places[token]
            change = (model(inputs_embeds=embeds[:, others]).logits[0, -1] - whole).abs().max()
            assert change > 0.01, f"dropping token {token} moves no logit by more than {change:.3f}"
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.7, "the tokens of a photograph should differ"


def test_a_seed_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    again = write_mistral3_checkpoint(tmp_path)
    assert {file.name for file in again.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name


def test_the_files_hold_the_released_names(checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert {
        "language_model.lm_head.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "multi_modal_projector.norm.weight",
        "multi_modal_projector.patch_merger.merging_layer.weight",
        "vision_tower.ln_pre.weight",
        "vision_tower.patch_conv.weight",
        "vision_tower.transformer.layers.3.attention.o_proj.weight",
    } <= names
    assert names == {
        renamed(name, RELEASED) for name in shapes_of(Mistral3ForConditionalGeneration, mistral3_config("tiny"))
    }


def test_vllms_mapper_reads_each_released_tensor_once() -> None:
    shapes = shapes_of(Mistral3ForConditionalGeneration, mistral3_config("24b"))
    names = [renamed(name, RELEASED) for name in shapes]
    assert Served.hf_to_vllm_mapper.apply_list(names) == names  # vLLM's modules are called as the released tensors are
    assert len([name for name in names if name.startswith("vision_tower.")]) == 24 * 9 + 2
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 24_011_361_280

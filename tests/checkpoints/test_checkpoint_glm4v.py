"""The GLM-4.1V and GLM-4.5V checkpoints: transformers and vLLM have to read them like released ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.model_executor.models.glm4_1v import Glm4vForConditionalGeneration as Served

from vllm_vtprune_checkpoints.glm4v import glm4v_config, released_shapes, write_glm4v_checkpoint
from vllm_vtprune_evaluation.photo import photograph

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
PROMPT = "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>What is it?<|assistant|>\n"


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glm4v_checkpoint(tmp_path_factory.mktemp("glm4v"), moe=request.param)


def test_transformers_uses_every_weight_and_looks_at_every_token(checkpoint: Path) -> None:
    model: Any
    model, loading = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False) == PROMPT
    inputs = processor(images=photograph(), text=PROMPT, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 24, 24]]
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    assert len(places) == 12 * 12
    with torch.inference_mode():
        [seen] = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[0, places] = seen
        whole = model(inputs_embeds=embeds).logits[0, -1]
        for token in (0, 17, 143):
            others = torch.arange(embeds.shape[1]) != places[token]
            change = (model(inputs_embeds=embeds[:, others]).logits[0, -1] - whole).abs().max()
            assert change > 0.01, f"dropping token {token} moves no logit by more than {change:.3f}"
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.7, "the tokens of a photograph should differ"


def test_a_seed_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    again = write_glm4v_checkpoint(tmp_path, moe="Moe" in (checkpoint / "config.json").read_text())
    assert {file.name for file in again.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name


def test_the_files_hold_the_released_names(checkpoint: Path) -> None:
    moe = "Moe" in (checkpoint / "config.json").read_text()
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        written = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert written == released_shapes(glm4v_config("tiny", moe=moe))
    mlp = "mlp.experts.3.up_proj" if moe else "mlp.gate_up_proj"
    assert {
        "lm_head.weight",
        "model.language_model.layers.1.self_attn.k_proj.bias",
        f"model.language_model.layers.1.{mlp}.weight",
        "model.visual.blocks.3.attn.qkv.weight",
        "model.visual.blocks.3.mlp.gate_proj.weight",
        "model.visual.downsample.bias",
        "model.visual.embeddings.position_embedding.weight",
        "model.visual.merger.post_projection_norm.bias",
    } <= set(written)


@pytest.mark.parametrize(("moe", "parameters"), [(False, 10_292_777_472), (True, 107_710_933_120)])
def test_vllms_mapper_reads_each_released_tensor_once(moe: bool, parameters: int) -> None:
    released = released_shapes(glm4v_config("released", moe=moe))
    names = Served.hf_to_vllm_mapper.apply_list(list(released))
    assert len(set(names)) == len(released)
    assert {name.split(".")[0] for name in names} == {"language_model", "visual"}
    vision = [name.removeprefix("visual.") for name in names if name.startswith("visual.")]
    assert len(vision) == 24 * 7 + 13
    assert sum(torch.Size(shape).numel() for shape in released.values()) == parameters

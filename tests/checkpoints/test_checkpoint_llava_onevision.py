"""The LLaVA-OneVision checkpoints: transformers reads them like released ones, and each token of an image counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaOnevisionForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration as Served

from vllm_vtprune_checkpoints.llava_onevision import write_llava_onevision_checkpoint
from vllm_vtprune_evaluation.photo import photograph

PROMPT = "<|im_start|>user <image>\nWhat is it?<|im_end|><|im_start|>assistant\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_onevision_checkpoint(tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    model, loading = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        pytest.param((50, 50), 16 + 4 * (4 + 1), id="one square"),
        pytest.param((60, 300), 16 + 20 * (4 + 1), id="five squares"),
        pytest.param((200, 60), 16 + 4 * (14 + 1), id="padding taken off"),
        pytest.param((512, 512), 16 + 12 * (12 + 1), id="36 squares scaled down to 9"),
    ],
)
def test_tokens_of_an_image(size: tuple[int, int], tokens: int, checkpoint: Path, model: Any) -> None:
    inputs = AutoProcessor.from_pretrained(checkpoint)(
        images=photograph().resize(size), text=PROMPT, return_tensors="pt"
    )
    places = inputs["input_ids"] == model.config.image_token_id
    with torch.inference_mode():
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[places] = seen
        whole = model(inputs_embeds=embeds).logits[0, -1]
        for token in (0, 17, len(seen) - 2):
            others = torch.arange(embeds.shape[1]) != places[0].nonzero()[token]
            change = (model(inputs_embeds=embeds[:, others]).logits[0, -1] - whole).abs().max()
            assert change > 0.02, f"dropping token {token} moves no logit by more than {change:.3f}"
    assert int(places.sum()) == len(seen) == tokens
    similarity = torch.nn.functional.cosine_similarity(seen[:, None], seen[None], dim=-1)
    assert similarity.mean() < 0.75, "the tokens of a photograph should differ"


def released(d: int, ff: int, layers: int, text: int, patches: int) -> dict[str, tuple[int, ...]]:
    """What a checkpoint like llava-hf/llava-onevision-qwen2-0.5b-ov-hf stores beside its language model."""
    vision = "vision_tower.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        "image_newline": (text,),
        "multi_modal_projector.linear_1.weight": (text, d),
        "multi_modal_projector.linear_1.bias": (text,),
        "multi_modal_projector.linear_2.weight": (text, text),
        "multi_modal_projector.linear_2.bias": (text,),
        f"{vision}embeddings.patch_embedding.weight": (d, 3, 14, 14),
        f"{vision}embeddings.patch_embedding.bias": (d,),
        f"{vision}embeddings.position_embedding.weight": (patches, d),
        f"{vision}post_layernorm.weight": (d,),
        f"{vision}post_layernorm.bias": (d,),
    }
    layer = {f"layer_norm{i}.{kind}": (d,) for i in (1, 2) for kind in ("weight", "bias")}
    layer |= {f"self_attn.{p}_proj.bias": (d,) for p in ("q", "k", "v", "out")}
    matrices = {f"self_attn.{p}_proj.weight": (d, d) for p in ("q", "k", "v", "out")}
    mlp = {"mlp.fc1.weight": (ff, d), "mlp.fc1.bias": (ff,), "mlp.fc2.weight": (d, ff), "mlp.fc2.bias": (d,)}
    for i in range(layers):
        shapes |= {f"{vision}encoder.layers.{i}.{name}": shape for name, shape in (layer | matrices | mlp).items()}
    return shapes


def test_names_and_shapes_are_the_released_ones_as_vllm_reads_them(tmp_path: Path) -> None:
    expected = released(d=128, ff=256, layers=4, text=256, patches=16)
    directory = write_llava_onevision_checkpoint(tmp_path, shards=2)
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    written = [(name, tuple(tensor.shape)) for file in files for name, tensor in file.items()]
    assert len(written) == len(dict(written)), "a tensor is in two shards"
    assert {name: shape for name, shape in written if not name.startswith("language_model.")} == expected
    names = [name for name, _ in written]
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} < set(names)
    assert Served.hf_to_vllm_mapper.apply_list(names) == names, "vLLM's modules are called alike"


def test_a_seed_gives_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    again = write_llava_onevision_checkpoint(tmp_path / "again")
    assert {file.name for file in again.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in again.iterdir():
        assert file.read_bytes() == (checkpoint / file.name).read_bytes(), file.name
    other = write_llava_onevision_checkpoint(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (checkpoint / "model.safetensors").read_bytes()


def test_released_shapes_without_weights(tmp_path: Path) -> None:
    directory = write_llava_onevision_checkpoint(tmp_path, size="0.5b", weights=False, dtype="bfloat16")
    assert not list(directory.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    shapes = {
        name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model."): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if "language_model" not in name and "lm_head" not in name
    }
    assert shapes == released(d=1152, ff=4304, layers=26, text=896, patches=27 * 27)
    assert config.image_grid_pinpoints[0] == [384, 384]
    assert config.image_grid_pinpoints[-1] == [2304, 2304]
    assert (config.dtype, config.text_config.vocab_size) == (torch.bfloat16, 152_000)


def test_the_chat_template_puts_images_first(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    for content in (parts, parts[::-1]):
        messages = [{"role": "user", "content": content}]
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == PROMPT

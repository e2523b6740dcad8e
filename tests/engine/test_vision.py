"""vLLM's own encoder, built in a process without an engine: what it gives is what plain transformers give."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.plugins import load_general_plugins

from vllm_vtprune.demo.qwen3_vl import write_qwen3_vl_checkpoint
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plan import plan_tokens
from vllm_vtprune.plugin.vision import Qwen3VLEncoder
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.towers.weights import TowerError

CLOSE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_vl_checkpoint(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def model_config(checkpoint: Path) -> Any:
    options: dict[str, Any] = dict(dtype="float32", max_model_len=1024, limit_mm_per_prompt={"image": 2, "video": 0})
    return EngineArgs(model=str(checkpoint), **options).create_model_config()


@pytest.fixture(scope="module")
def encoder(model_config: Any) -> Iterator[Qwen3VLEncoder]:
    yield Qwen3VLEncoder.of(model_config, torch.device("cpu"))
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval().model


def patches(model_config: Any, rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """An image of so many patches, as the image processor leaves it: values of pixels from 0 to 255."""
    vision = model_config.hf_config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows * columns, width), generator=generator, dtype=torch.uint8)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([1, rows, columns])}


@torch.inference_mode()
def test_features_are_those_of_transformers(encoder: Qwen3VLEncoder, model_config: Any, reference: Any) -> None:
    images = [patches(model_config, 8, 12), patches(model_config, 16, 4, seed=1)]
    seen: list[torch.Tensor] = []
    hook = reference.visual.merger.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for image, found in zip(images, encoder.encode(images), strict=True):
        pixels = image["pixel_values"].float() / 127.5 - 1
        expected = reference.get_image_features(pixels, image["image_grid_thw"][None])
        torch.testing.assert_close(found.embeds, expected.pooler_output[0], rtol=0, atol=CLOSE)
        deepstack = torch.cat([plane for [plane] in expected.deepstack_features], dim=1)
        torch.testing.assert_close(found.deepstack, deepstack, rtol=0, atol=CLOSE)
        means = seen.pop().reshape(found.num_tokens, 4, -1).mean(dim=1)
        torch.testing.assert_close(found.encoder, means, rtol=0, atol=CLOSE)
        assert found.grid == tuple(side // 2 for side in image["image_grid_thw"].tolist()[1:])
    hook.remove()


def test_no_language_model_is_held(encoder: Qwen3VLEncoder, reference: Any) -> None:
    assert encoder.num_parameters == sum(weights.numel() for weights in reference.visual.parameters())


def test_rows_are_those_of_the_token_table(encoder: Qwen3VLEncoder, reference: Any) -> None:
    ids = [5, 700, 5]
    assert torch.equal(encoder.token_rows(ids), reference.language_model.embed_tokens.weight[ids])


def test_a_blank_image_can_be_encoded(encoder: Qwen3VLEncoder) -> None:
    [found] = encoder.encode([encoder.blank()])
    assert found.num_tokens == 16
    assert encoder.encode([]) == []


def test_deepstack_goes_where_its_token_goes(encoder: Qwen3VLEncoder, model_config: Any) -> None:
    [found] = encoder.encode([patches(model_config, 8, 8)])
    for method in ("resprune", "trim"):
        policy = PruningPolicy.parse({"method": method, "budget": {"type": "tokens", "keep": 5}})
        plan = plan_tokens(found, policy)
        rows = encoder.sequence(found, plan)
        assert found.deepstack is not None
        assert torch.equal(rows, torch.cat([plan.embeds, found.deepstack[plan.kept]], dim=1))
    shallow = dataclasses.replace(found, deepstack=None)
    assert torch.equal(encoder.sequence(shallow, plan), plan.embeds)


def test_random_weights_keep_tokens_apart(model_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTPRUNE_LOAD_FORMAT", "dummy")
    encoder = Qwen3VLEncoder.of(model_config, torch.device("cpu"))
    found: VisualFeatures = encoder.encode([patches(model_config, 8, 8)])[0]
    assert encoder.weights == "dummy"
    unit = torch.nn.functional.normalize(found.embeds - found.embeds.mean(dim=0), dim=1)
    assert (unit @ unit.T).fill_diagonal_(0).abs().max() < 0.99
    assert torch.equal(encoder.token_rows([3]), Qwen3VLEncoder.of(model_config, torch.device("cpu")).token_rows([3]))


@pytest.mark.parametrize("size", [(320, 320), (96, 640), (1500, 900), (64, 64), (33, 200)])
def test_tokens_are_counted_as_the_image_processor_scales(model_config: Any, size: tuple[int, int]) -> None:
    """And a picture that is scaled down has no more of them than the budget."""
    load_general_plugins()
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    picture = Image.new("RGB", size[::-1], "gray")

    def placed(policy: object) -> int:
        options = {} if policy is None else {"pruning": policy}
        items = processor.info.parse_mm_data({"image": [picture]})
        inputs = ProcessorInputs([processor.image_token_id], items, hf_processor_mm_kwargs=options)
        [place] = processor.apply(inputs, TimingContext())["mm_placeholders"]["image"]
        return int(place.get_num_embeds())

    whole = placed(None)
    assert processor.num_tokens(size, {}) == whole
    assert 1 <= placed({"method": "resize", "budget": {"type": "tokens", "keep": 9}}) <= min(9, whole)


def test_another_device_than_vllm_s_is_refused(model_config: Any) -> None:
    with pytest.raises(TowerError, match=r"vLLM's code for cpu, not on cuda:0: set VTPRUNE_DEVICE to auto"):
        Qwen3VLEncoder.of(model_config, torch.device("cuda:0"))

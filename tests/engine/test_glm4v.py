"""GLM-4.1V: positions of a prompt with a video between pruned images are those that its tokens have unpruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from tests.support.processors import config_of, features_of, process_prompt
from tests.support.videos import video
from vllm_vtprune.plugin.items import KEPT_POSITIONS
from vllm_vtprune.plugin.vision import build
from vllm_vtprune_checkpoints.glm4v import write_glm4v_checkpoint
from vllm_vtprune_evaluation.photo import photograph

IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
PROMPT = f"{IMAGE}one<|begin_of_video|><|video|><|end_of_video|>two{IMAGE}What is it?"


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    limits = {"image": 2, "video": 1}
    return config_of(write_glm4v_checkpoint(tmp_path_factory.mktemp("glm4v")), limit_mm_per_prompt=limits)


@pytest.fixture(scope="module")
def processor(model_config: Any) -> Any:
    return MULTIMODAL_REGISTRY.create_processor(model_config)


def placed(processor: Any, **options: object) -> tuple[list[int], list[MultiModalFeatureSpec]]:
    images = [photograph().resize(size) for size in ((300, 200), (120, 400))]
    out = process_prompt(processor, PROMPT, images, videos=[video(8, 140, 112)], **options)
    return out["prompt_token_ids"], features_of(out)


def test_a_video_between_pruned_images(processor: Any, model_config: Any) -> None:
    model = build(model_config, torch.device("cpu")).model
    whole_ids, whole = placed(processor)
    positions, delta = model.get_mrope_input_positions(whole_ids, whole)
    ids, features = placed(processor, pruning={"method": "divprune", "budget": {"type": "ratio", "keep": 0.3}})
    left = torch.ones(len(whole_ids), dtype=torch.bool)
    for before, after in zip(whole, features, strict=True):
        if after.modality == "image":
            begin = before.mm_position.offset
            left[begin : begin + before.mm_position.length] = False
            left[begin + after.data[KEPT_POSITIONS].data] = True
    assert torch.tensor(whole_ids)[left].tolist() == ids
    pruned_positions, pruned_delta = model.get_mrope_input_positions(ids, features)
    assert torch.equal(pruned_positions, positions[:, left])
    assert pruned_delta + len(ids) == delta + len(whole_ids)

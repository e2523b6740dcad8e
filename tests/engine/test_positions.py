"""Positions of three numbers (M-RoPE), without an engine: exactly those that transformers gives the unpruned prompt."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.support.families import Chat, Turn
from tests.support.images import sample_images
from tests.support.processors import config_of, features_of, process_prompt
from vllm_vtprune.families import ARCHITECTURES, FAMILIES
from vllm_vtprune.plugin.image import encode_image
from vllm_vtprune.plugin.items import KEPT_EMBEDS
from vllm_vtprune.plugin.positions import UnprunedPositions
from vllm_vtprune_checkpoints import write_checkpoint

M_ROPE = ("glm4v", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
PICTURES = [sample_images(9)[index].resize(size) for index, size in ((0, (200, 400)), (1, (420, 210)), (5, (280, 280)))]
TURNS = [Turn("What is it?", 2), Turn("And this?", 1), Turn("Compare them.")]


def test_every_family_with_such_positions_is_here() -> None:
    for name, architectures in FAMILIES.items():
        for architecture in architectures:
            assert issubclass(pkgutil.resolve_name(ARCHITECTURES[architecture]), UnprunedPositions) == (name in M_ROPE)


@pytest.fixture(scope="module", params=M_ROPE)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return config_of(write_checkpoint(request.param, tmp_path_factory.mktemp("family")))


@pytest.fixture(scope="module")
def processor(config: Any) -> Any:
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.fixture(scope="module")
def expected(config: Any) -> Any:
    """Of a prompt and the grids of its images: its positions in transformers (3, L), and what follows the last."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config.hf_config)

    def positions(prompt: list[int], grids: Tensor) -> tuple[Tensor, int]:
        ids = torch.tensor([prompt])
        kinds = (ids == model.config.image_token_id).int()
        position_ids, delta = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        return position_ids[:, 0], len(prompt) + int(delta)

    return positions


def kept(item: Any, embeds: Tensor) -> Tensor:
    """Which of an image's tokens (N, d) are in the prompt, by what the engine is given."""
    if KEPT_EMBEDS not in item:
        return torch.arange(len(embeds))
    return torch.cdist(item[KEPT_EMBEDS].data[:, : embeds.shape[1]], embeds).argmin(dim=1)


@pytest.mark.parametrize("keep", [(0.1, 0.5, 0.9), (0.3, None, 0.3), (None, 0.2, None), (0.02, 0.02, 0.02)])
def test_each_token_stands_where_it_does_unpruned(
    keep: tuple[float | None, ...], config: Any, processor: Any, expected: Any
) -> None:
    prompt = Chat(Path(config.model)).prompt(TURNS)
    policies = [each is not None and {"budget": {"type": "ratio", "keep": each}} for each in keep]
    pruned = process_prompt(processor, prompt, PICTURES, pruning={"images": policies})
    whole = process_prompt(processor, prompt, PICTURES)
    grids = torch.stack([item["image_grid_thw"].data for item in whole["mm_kwargs"]["image"]])
    positions, following = expected(whole["prompt_token_ids"], grids)

    left, read = [], 0
    for picture, place, item in zip(
        PICTURES, whole["mm_placeholders"]["image"], pruned["mm_kwargs"]["image"], strict=True
    ):
        embeds = encode_image(processor, picture).embeds
        left += [torch.arange(read, place.offset), place.offset + kept(item, embeds)]
        read = place.offset + place.length
    left.append(torch.arange(read, len(whole["prompt_token_ids"])))

    ids = pruned["prompt_token_ids"]
    model = processor.runtime.local.vision_encoder._model
    for covered in range(len(PICTURES) + 1):  # by the prefix cache: of those, the engine has what stays on the CPU
        features = features_of(pruned)
        for feature in features[:covered]:
            fields = {name: field for name, field in feature.data.items() if field.field.keep_on_cpu}
            feature.data = type(feature.data)(fields)
        position_ids, delta = model.get_mrope_input_positions(ids, features)
        assert torch.equal(position_ids, positions[:, torch.cat(left)])
        assert delta + len(ids) == following

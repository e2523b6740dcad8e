"""A 2 x 2 merger for the demo model, like those of Qwen, GLM and InternVL.

It replaces the projector, so a picture has 144 tokens instead of 576. The encoder is the embedded model's. `python -m
training.merged` trains merger and language model together and writes one file, which only `vtprune eval --merged`
reads; no engine serves such a model.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu

from vllm_vtprune.features import VisualFeatures

FILE = "merged.safetensors"
ACROSS = 2  # patches of a token, in either direction
PATCHES = ACROSS**2


class Merger(nn.Module):
    """Four patches side by side, each normalised, through two layers.

    Args:
        patch: width of a patch.
        token: width of a token.
    """

    def __init__(self, patch: int, token: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(patch)
        self.linear_1 = nn.Linear(PATCHES * patch, PATCHES * token)
        self.linear_2 = nn.Linear(PATCHES * token, token)

    def forward(self, patches: Tensor) -> Tensor:
        """(..., n, patch), the rows of a square picture -> (..., n / 4, token)"""
        merged: Tensor = self.linear_2(gelu(self.linear_1(self.norm(by_token(patches)).flatten(-2))))
        return merged


def by_token(patches: Tensor) -> Tensor:
    """(..., n, d), the rows of a square picture -> (..., n / 4, 4, d), the patches of each token in raster order."""
    *batch, count, width = patches.shape
    side = isqrt(count) // ACROSS
    squares = patches.reshape(*batch, side, ACROSS, side, ACROSS, width)
    return squares.transpose(-4, -3).reshape(*batch, side**2, PATCHES, width)


@torch.no_grad()
def merged_features(features: VisualFeatures, merger: Merger) -> VisualFeatures:
    """Merge features of patches like `vllm_vtprune.plugin.vision`: means of ``encoder`` and keys, sums of attention."""
    assert features.grid is not None
    assert features.cls_attention is not None
    assert features.keys is not None
    rows, columns = features.grid
    return replace(
        features,
        encoder=by_token(features.encoder).mean(dim=1),
        embeds=merger(features.encoder),
        grid=(rows // ACROSS, columns // ACROSS),
        cls_attention=by_token(features.cls_attention[:, None]).sum(dim=(1, 2)),
        keys=by_token(features.keys).mean(dim=1),
    )


def save_merged(directory: Path, merger: Merger, model: Any) -> Path:
    """Write the merger, and the language model of a `LlavaForConditionalGeneration`."""
    parts = {"merger": merger, "language_model": model.model.language_model, "lm_head": model.lm_head}
    file = directory / FILE
    weights = {f"{part}.{name}": rows for part, module in parts.items() for name, rows in module.state_dict().items()}
    save_file(weights, file)
    return file


def load_merged(directory: Path, model: Any) -> Merger:
    """Load the merger, and its language model's weights into a `LlavaForConditionalGeneration`.

    Raises:
        ValueError: the folder has no valid file of `save_merged`, or one of another model.
    """
    vision, text = model.config.vision_config, model.config.text_config
    merger = Merger(vision.hidden_size, text.hidden_size)
    parts = {"merger": merger, "language_model": model.model.language_model, "lm_head": model.lm_head}
    try:
        weights = load_file(directory / FILE)
        for part, module in parts.items():
            state = {k.removeprefix(f"{part}."): rows for k, rows in weights.items() if k.startswith(f"{part}.")}
            module.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{directory}: expected a folder that python -m training.merged wrote ({problem})") from error
    return merger.eval()

"""Positions of three numbers (M-RoPE) of a prompt with pruned images: those that its tokens would have without pruning.

The prompt is laid out as if nothing were pruned, vLLM numbers it, and the numbers of the tokens that are gone are left
out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.models.interfaces import is_hybrid
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_vtprune.plugin.items import KEPT_POSITIONS
from vllm_vtprune.plugin.selection import SELECTION


class KeepsPositions:
    """Mixin before a stock model with M-RoPE, whose images are one run of placeholders each."""

    config: Any

    @classmethod
    def get_model_state_cls(cls) -> type:
        """What Model Runner V2 keeps of requests of this model: positions, too, of tokens that the engine selects."""
        from vllm_vtprune.plugin.model_state import DefaultState, HybridState  # of V2, which needs Triton

        return HybridState if is_hybrid(cls) else DefaultState

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Where each token of a prompt stands: exactly where it would without pruning.

        Args:
            input_tokens: L token ids.
            mm_features: images and videos of the prompt. Of one that the engine does not encode, it may have nothing
                but the fields that stay on the CPU.

        Returns:
            (3, L) time, height and width of each token, and what to add to the index of a token after the prompt to
            get its position, in all three.
        """
        if not any(_kept_positions(feature) is not None for feature in mm_features):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        merge = self.config.vision_config.spatial_merge_size
        whole_tokens: list[int] = []  # the prompt, without pruning
        whole_features: list[MultiModalFeatureSpec] = []
        present = []  # of the tokens of that prompt, those that are in ours
        read = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            begin, length = feature.mm_position.offset, feature.mm_position.length
            present.append(len(whole_tokens) + torch.arange(begin - read))
            whole_tokens += input_tokens[read:begin]
            kept, tokens = _kept_positions(feature), input_tokens[begin : begin + length]
            embeds = None
            if kept is None:
                kept = torch.arange(length)
                embeds = feature.mm_position.is_embed  # between the frames of a video stand their times
            else:
                tokens = tokens[:1] * (int(_field(feature, "image_grid_thw").prod()) // merge**2)
            place = PlaceholderRange(len(whole_tokens), len(tokens), embeds)
            present.append(len(whole_tokens) + kept)
            whole_tokens += tokens
            whole_features.append(replace(feature, mm_position=place))
            read = begin + length
        present.append(len(whole_tokens) + torch.arange(len(input_tokens) - read))
        whole_tokens += input_tokens[read:]
        positions, delta = super().get_mrope_input_positions(whole_tokens, whole_features)  # type: ignore[misc]
        return positions[:, torch.cat(present)], delta + len(whole_tokens) - len(input_tokens)


def _field(feature: MultiModalFeatureSpec, name: str) -> torch.Tensor:
    assert feature.data is not None, "models with positions of three numbers get at least what stays on the CPU"
    data = feature.data[name].data
    assert isinstance(data, torch.Tensor)
    return data


def _kept_positions(feature: MultiModalFeatureSpec) -> torch.Tensor | None:
    """(k,) which of an image's tokens are in the prompt; None where all are, and for other media.

    Those that the engine selects are not known before it has: until then, the first ones.
    """
    if feature.data is None:
        return None
    if SELECTION in feature.data:
        return torch.arange(feature.mm_position.length)
    if KEPT_POSITIONS not in feature.data:
        return None
    return _field(feature, KEPT_POSITIONS)

"""M-RoPE positions of a prompt with pruned images: every token keeps the position that it has without pruning.

Lay the prompt out unpruned, let vLLM compute its positions, and drop those of pruned tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.models.interfaces import is_hybrid
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_vtprune.plugin.items import KEPT_POSITIONS
from vllm_vtprune.plugin.selection import SELECTION


class UnprunedPositions:
    """Mixin before a stock M-RoPE model whose image placeholders are contiguous."""

    config: Any

    @classmethod
    def get_model_state_cls(cls) -> type:
        """What Model Runner V2 keeps of requests of this model: positions, too, of tokens that the engine selects."""
        from vllm_vtprune.plugin.model_state import DefaultState, HybridState  # of V2, which needs Triton

        return HybridState if is_hybrid(cls) else DefaultState

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """The position of each token, as without pruning.

        Args:
            input_tokens: L token ids of the pruned prompt.
            mm_features: its images and videos. Items that the engine does not encode may hold only their CPU fields.

        Returns:
            (3, L) time, height and width of each token; and the offset from the index of a generated token to its
            position.
        """
        if not any(_kept_positions(feature) is not None for feature in mm_features):
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        merge = self.config.vision_config.spatial_merge_size
        unpruned_tokens: list[int] = []
        unpruned_features: list[MultiModalFeatureSpec] = []
        kept_index = []  # indices into `unpruned_tokens` of the tokens in `input_tokens`
        end = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            begin, length = feature.mm_position.offset, feature.mm_position.length
            kept_index.append(len(unpruned_tokens) + torch.arange(begin - end))
            unpruned_tokens += input_tokens[end:begin]
            kept, tokens = _kept_positions(feature), input_tokens[begin : begin + length]
            embeds = None
            if kept is None:
                kept = torch.arange(length)
                embeds = feature.mm_position.is_embed  # timestamps stand between the frames of a video
            else:
                tokens = tokens[:1] * (int(_field(feature, "image_grid_thw").prod()) // merge**2)
            placeholder = PlaceholderRange(len(unpruned_tokens), len(tokens), embeds)
            kept_index.append(len(unpruned_tokens) + kept)
            unpruned_tokens += tokens
            unpruned_features.append(replace(feature, mm_position=placeholder))
            end = begin + length
        kept_index.append(len(unpruned_tokens) + torch.arange(len(input_tokens) - end))
        unpruned_tokens += input_tokens[end:]
        positions, delta = super().get_mrope_input_positions(unpruned_tokens, unpruned_features)  # type: ignore[misc]
        return positions[:, torch.cat(kept_index)], delta + len(unpruned_tokens) - len(input_tokens)


def _field(feature: MultiModalFeatureSpec, name: str) -> torch.Tensor:
    assert feature.data is not None, "vLLM passes M-RoPE models at least the CPU fields"
    data = feature.data[name].data
    assert isinstance(data, torch.Tensor)
    return data


def _kept_positions(feature: MultiModalFeatureSpec) -> torch.Tensor | None:
    """(k,) indices of a pruned image's kept tokens; None for other items.

    Tokens that the engine selects are unknown before it has encoded the image: the first k stand for them.
    """
    if feature.data is None:
        return None
    if KEPT_POSITIONS in feature.data:
        return _field(feature, KEPT_POSITIONS)
    return torch.arange(feature.mm_position.length) if SELECTION in feature.data else None

"""M-RoPE positions of tokens that the engine selects, in vLLM's Model Runner V2.

The runner numbers a prompt when its request comes, before any image of it is encoded. Text stands where it would
without pruning, whichever tokens are kept; kept tokens are placed after their image is encoded, before each step that
reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.utils import get_mm_features_in_window
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.states import RequestState

from vllm_vtprune.plugin.in_engine import KEPT


class PlacesKeptTokens(DefaultModelState):
    """Mixin before the runner's state of a model with M-RoPE."""

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> torch.Tensor:
        """Encode what is scheduled, as the stock state does, and place the kept tokens of this step's images."""
        embeds = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        for index, request in enumerate(input_batch.req_ids):
            features = self.encoder_cache.mm_features[request]
            start = int(input_batch.num_computed_tokens_np[index])
            end = start + int(input_batch.num_scheduled_tokens[index])
            first, last = get_mm_features_in_window(features, start=start, end=end)
            for feature in features[first:last]:
                self._place(feature, int(input_batch.idx_mapping_np[index]))
        return embeds

    def _place(self, feature: MultiModalFeatureSpec, slot: int) -> None:
        kept = getattr(self.encoder_cache.encoder_outputs.get(feature.identifier), KEPT, None)
        if kept is None or self.rope_state is None:
            return
        config: Any = self.model_config.hf_config
        columns = int(feature.data["image_grid_thw"].data[2]) // config.vision_config.spatial_merge_size
        begin = feature.mm_position.offset
        positions = self.rope_state.read_prefill_positions(slot, begin + len(kept))[:, begin:]
        corner = positions[0, 0].clone()  # an image has one time, which is also its first row and column
        places = torch.stack([torch.zeros_like(kept), kept // columns, kept % columns])
        positions.copy_(places.to(positions) + corner)


class DefaultState(PlacesKeptTokens):
    """Of a model with attention alone."""


class HybridState(PlacesKeptTokens, MambaHybridModelState):
    """Of a model with layers of linear attention."""

"""GLM-4.1V, 4.5V and 4.6V (``Glm4vForConditionalGeneration``, ``Glm4vMoeForConditionalGeneration``).

Images at native resolution, M-RoPE, and a convolution that merges 2 x 2 patches into a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.models.glm4v.image_processing_glm4v import smart_resize
from vllm.model_executor.models.glm4_1v import (
    Glm4vForConditionalGeneration,
    Glm4vMoeForConditionalGeneration,
    Glm4vMultiModalProcessor,
)

from vllm_vtprune.plugin.families.qwen import PROVIDES, GridProcessor, merge_size
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.plugin.limits import VIDEO_OPTIONS
from vllm_vtprune.plugin.model import PrunedModel, processed_by
from vllm_vtprune.plugin.positions import UnprunedPositions


def patches(downsample: nn.Module, blocks: Tensor) -> Tensor:
    """Patches of each token: (T, C, 2, 2) -> (T, 4, C)."""
    return blocks.flatten(2).transpose(1, 2)


def feed_forward(config: Any) -> int:
    """Feed-forward width of the encoder; ``intermediate_size`` is the connector's."""
    size: int = config.vision_config.out_hidden_size
    return size


class PrunedGlm4vProcessor(GridProcessor, Glm4vMultiModalProcessor):
    """One token per 28 x 28 pixels."""

    family = Family(
        name="glm4v",
        clip_alpha=0.3,  # Qwen2.5-VL's; not calibrated
        provides=PROVIDES,
        drops_duplicates=True,
        connector="visual.downsample",
        rows=patches,
        merge=merge_size,
        intermediate=feed_forward,
        options=VIDEO_OPTIONS | {"do_resize", "size"},
    )

    def resized(self, height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
        """GLM treats an image as several frames, also in its pixel limits."""
        frames = self.info.get_hf_config().vision_config.temporal_patch_size
        scaled: tuple[int, int] = smart_resize(frames, height, width, frames, unit, least, most)
        return scaled

    def at_area(self, hf_kwargs: Mapping[str, object], area: int) -> Mapping[str, object]:
        return super().at_area(hf_kwargs, area * self.info.get_hf_config().vision_config.temporal_patch_size)


@processed_by(PrunedGlm4vProcessor)
class PrunedGlm4vForConditionalGeneration(UnprunedPositions, PrunedModel, Glm4vForConditionalGeneration):
    """GLM-4.1V with pruned images."""


@processed_by(PrunedGlm4vProcessor)
class PrunedGlm4vMoeForConditionalGeneration(UnprunedPositions, PrunedModel, Glm4vMoeForConditionalGeneration):
    """GLM-4.5V with pruned images."""

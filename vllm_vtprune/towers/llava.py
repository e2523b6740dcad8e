"""LLaVA-1.5: a CLIP vision transformer and a two-layer projector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.towers.clip import ALIASES, ClipTower, build_module

__all__ = ["LlavaTower"]


class LlavaTower(ClipTower):
    """The tower of LlavaForConditionalGeneration with a CLIP encoder.

    `seed`: None reads `model_dir`; a number fills the tower with random weights instead. Raises TowerError where the
    config is not supported or the files do not fit.
    """

    def __init__(
        self, model_dir: Path, *, hf_config: Any, dtype: torch.dtype, device: torch.device, seed: int | None
    ) -> None:
        module = build_module(hf_config)
        super().__init__(
            model_dir, hf_config=hf_config, module=module, aliases=ALIASES, dtype=dtype, device=device, seed=seed
        )

    def blank(self) -> PreparedImage:
        return {"pixel_values": torch.zeros(3, self._image_size, self._image_size)}

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        """As `VisionTower.encode`, for images whose `pixel_values` are (3, S, S), with S the encoder's image size.

        The features are those of `Seen`, by the same names.
        """
        size = self._image_size
        for image in images:
            if (shape := tuple(image["pixel_values"].shape)) != (3, size, size):
                raise ValueError(f"pixel_values have shape {shape}; expected (3, {size}, {size})")
        if not images:
            return []

        seen = self.see(torch.stack([image["pixel_values"] for image in images]))
        return [
            VisualFeatures(
                encoder=seen.encoder[i].clone(),
                embeds=seen.embeds[i].clone(),
                grid=(self._side, self._side),
                cls_attention=None if seen.cls_attention is None else seen.cls_attention[i].clone(),
                keys=None if seen.keys is None else seen.keys[i].clone(),
            )
            for i in range(len(images))
        ]

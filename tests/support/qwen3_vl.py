"""Qwen3-VL in plain transformers: DeepStack of the kept tokens alone, and the time before each frame of a video."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen3VLForConditionalGeneration

from tests.support.defaults import QWEN
from tests.support.qwen2_5_vl import Medium, QwenReference


class Qwen3Reference(QwenReference):
    """As for Qwen2.5-VL, but for what differs."""

    model_class = Qwen3VLForConditionalGeneration
    family = QWEN

    @torch.inference_mode()
    def video(self, frames: Any, seconds_per_step: float) -> Medium:
        medium = self._video(frames)
        first = seconds_per_step / 4  # a step has two frames, and its time is half way between them
        return medium._replace(timestamps=tuple(first + seconds_per_step * step for step in range(medium.grid[0])))

    def _medium(self, features: Any, grid_thw: torch.Tensor) -> Medium:
        deepstack = torch.cat([rows for [rows] in features.deepstack_features], dim=1)
        return super()._medium(features, grid_thw)._replace(deepstack=deepstack)

    def _placeholders(self, token: int, medium: Medium) -> list[int]:
        if token == self.image_token:
            return super()._placeholders(token, medium)
        start, end = self.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        ids: list[int] = []
        for frame, second in zip(_frames(medium), medium.timestamps, strict=True):
            ids += self.tokenizer(f"<{second:.1f} seconds>")["input_ids"]
            ids += [start, *super()._placeholders(token, frame), end]
        return ids

    def positions(self, prompt_ids: Sequence[int], media: Sequence[Medium], answer: int) -> torch.Tensor:
        """As for Qwen2.5-VL, where each frame of a video is numbered like an image."""
        return super().positions(prompt_ids, [frame for medium in media for frame in _frames(medium)], answer)

    def _deeper(self, visual: torch.Tensor, media: Sequence[Medium]) -> dict[str, Any]:
        if not media:
            return {}
        levels = len(self.model.config.vision_config.deepstack_visual_indexes)
        kept = [medium.deepstack[medium.kept] for medium in media if medium.deepstack is not None]
        return {"visual_pos_masks": visual[None], "deepstack_visual_embeds": torch.cat(kept).chunk(levels, dim=1)}


def _frames(medium: Medium) -> list[Medium]:
    """The frames of a video, of which every token is kept; an image itself."""
    _, height, width = medium.grid
    frame = medium._replace(grid=(1, height, width), kept=torch.arange(height * width))
    return [frame] * len(medium.timestamps) if medium.timestamps else [medium]

"""Qwen2.5-VL: prompts in its chat form, a model in plain transformers, and positions by hand where tokens are gone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from tests.support.reference import Reference

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def ask_about(question: str, media: str) -> str:
    """A prompt: the media and a question. It ends where the answer begins."""
    return f"{SYSTEM}<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n"


class Medium(NamedTuple):
    """An image or a video: all its embeddings (N, d), its grid (t, h, w) in tokens, and which of the N are kept."""

    embeds: torch.Tensor
    grid: tuple[int, int, int]
    kept: torch.Tensor
    time_step: int = 1  # positions from one frame to the next


class QwenReference(Reference):
    """Built from the checkpoint alone, in float32 with eager attention."""

    model_class: Any = Qwen2_5_VLForConditionalGeneration

    def __init__(self, checkpoint: Path) -> None:
        self.model, loading = self.model_class.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), f"not every weight of the checkpoint was used: {loading}"
        self.model.eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.tokenizer = self.processor.tokenizer
        self.image_token = self.model.config.image_token_id
        self.video_token = self.model.config.video_token_id

    def visual_embeds(self, image: Image.Image) -> torch.Tensor:
        return self.image(image).embeds

    def video_embeds(self, frames: Any) -> torch.Tensor:
        """(N, d): a video (frames, height, width, 3)."""
        return self.video(frames, 1.0).embeds

    @torch.inference_mode()
    def image(self, image: Image.Image, **options: Any) -> Medium:
        """An image of which every token is kept. `options`: of the image processor."""
        inputs = self.processor.image_processor(images=[image.convert("RGB")], return_tensors="pt", **options)
        return self._medium(self.model.get_image_features(**inputs), inputs["image_grid_thw"])

    @torch.inference_mode()
    def video(self, frames: Any, seconds_per_step: float) -> Medium:
        """A video (frames, height, width, 3), every token of it kept."""
        step = int(seconds_per_step * self.model.config.vision_config.tokens_per_second)
        return self._video(frames)._replace(time_step=step)

    def _video(self, frames: Any) -> Medium:
        inputs = self.processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
        features = self.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        return self._medium(features, inputs["video_grid_thw"])

    def _medium(self, features: Any, grid_thw: torch.Tensor) -> Medium:
        [embeds] = features.pooler_output
        frames, height, width = grid_thw[0].tolist()
        merge = self.model.config.vision_config.spatial_merge_size
        return Medium(embeds, (frames, height // merge, width // merge), torch.arange(len(embeds)))

    def positions(self, prompt_ids: Sequence[int], media: Sequence[Medium], answer: int) -> torch.Tensor:
        """(3, L + answer): time, height and width of each token of a prompt and of its answer, one after the other.

        A kept token stands at its own place in the whole grid; what follows begins one after the grid's largest
        position, whatever was kept.
        """
        remaining = iter(media)
        coordinates: list[tuple[int, int, int]] = []
        following = 0
        index = 0
        while index < len(prompt_ids):
            if prompt_ids[index] not in (self.image_token, self.video_token):
                coordinates.append((following,) * 3)
                following += 1
                index += 1
                continue
            medium = next(remaining)
            frames, height, width = medium.grid
            for token in medium.kept.tolist():
                frame, place = divmod(token, height * width)
                row, column = divmod(place, width)
                coordinates.append((following + frame * medium.time_step, following + row, following + column))
            index += len(medium.kept)
            following += max((frames - 1) * medium.time_step, height - 1, width - 1) + 1
        coordinates += [(following + step,) * 3 for step in range(answer)]
        return torch.tensor(coordinates).T

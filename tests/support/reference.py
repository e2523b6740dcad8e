"""Models in plain transformers, and what their language models read of images and videos."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoVideoProcessor,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)


class Reference:
    """LLaVA-1.5, built from the checkpoint alone, in float32 with eager attention."""

    model_class = LlavaForConditionalGeneration

    def __init__(self, checkpoint: Path) -> None:
        self.model, loading = self.model_class.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), f"not every weight of the checkpoint was used: {loading}"
        self.model.eval()
        self.checkpoint = checkpoint
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        self._pixels = AutoImageProcessor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def visual_embeds(self, image: Image.Image) -> torch.Tensor:
        """(N, d): an image's tokens as the language model reads them."""
        pixels = self._pixels(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values=pixels).pooler_output[0]

    def kept_embeds(self, embeds: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """(T, d): what the language model reads of an image with these `visual_embeds` of which only some are kept."""
        return embeds[kept]

    @torch.inference_mode()
    def noun_embeds(self, nouns: Sequence[str]) -> torch.Tensor | None:
        """(M, d): rows of the input table for words as they stand inside a sentence."""
        ids = [token for noun in nouns for token in self.tokenizer.encode(f" {noun}", add_special_tokens=False)]
        return self.model.get_input_embeddings()(torch.tensor(ids)) if ids else None


class LlavaNextReference(Reference):
    """LLaVA-NeXT. The newlines are among the `visual_embeds`, and no index of a kept token counts them."""

    model_class = LlavaNextForConditionalGeneration

    @torch.inference_mode()
    def visual_embeds(self, image: Image.Image) -> torch.Tensor:
        inputs = self._pixels(image.convert("RGB"), return_tensors="pt")
        return self.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]

    def kept_embeds(self, embeds: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Every row ends with its newline, also one of which no token is kept."""
        stays = (embeds == self.model.model.image_newline).all(dim=1)
        tokens = (~stays).nonzero()[:, 0]
        stays[tokens[kept]] = True
        return embeds[stays]


class InternVLReference(Reference):
    """InternVL in transformers' layout."""

    model_class = InternVLForConditionalGeneration

    @torch.inference_mode()
    def visual_embeds(self, image: Image.Image) -> torch.Tensor:
        pixels = self._pixels(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values=pixels).pooler_output.flatten(0, 1)

    @torch.inference_mode()
    def video_embeds(self, frames: Any) -> torch.Tensor:
        """(N, d): a video (frames, height, width, 3), one tile for each frame."""
        processor = AutoVideoProcessor.from_pretrained(self.checkpoint)
        pixels = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
        return self.model.get_image_features(pixel_values=pixels.flatten(0, 1)).pooler_output.flatten(0, 1)

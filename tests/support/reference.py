"""Models in plain transformers that read a prompt in which only some tokens of each image are left."""

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
        self.image_token = self.model.config.image_token_id
        self.media_tokens = [self.image_token]

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

    def prompt_ids(self, prompt: str, kept: Sequence[int]) -> list[int]:
        """The prompt's tokens, with `kept[i]` placeholders for its i-th image."""
        counts = iter(kept)
        ids: list[int] = []
        for token in self.tokenizer(prompt)["input_ids"]:
            ids += [token] * next(counts) if token == self.image_token else [token]
        return ids

    @torch.inference_mode()
    def logprobs(
        self, prompt_ids: Sequence[int], images: Sequence[torch.Tensor], answer: Sequence[int]
    ) -> torch.Tensor:
        """(T, vocabulary): log-probabilities at each of the T tokens of `answer`, given the prompt and those before.

        Positions run from 0 without gaps. Where every token of `answer` is the likeliest of its row, `answer` is what
        greedy decoding gives.
        """
        table = self.model.get_input_embeddings()
        ids = torch.tensor(prompt_ids)
        prompt = table(ids)
        prompt[torch.isin(ids, torch.tensor(self.media_tokens))] = torch.cat(list(images))
        embeds = torch.cat([prompt, table(torch.tensor(answer[:-1], dtype=torch.long))])
        logits = self.model(inputs_embeds=embeds[None], position_ids=torch.arange(len(embeds))[None]).logits[0]
        return logits[len(prompt_ids) - 1 :].float().log_softmax(dim=-1)


class LlavaNextReference(Reference):
    """LLaVA-NeXT. The newlines are among the `visual_embeds`, and no index of a kept token counts them."""

    model_class = LlavaNextForConditionalGeneration

    @torch.inference_mode()
    def visual_embeds(self, image: Image.Image) -> torch.Tensor:
        inputs = self._pixels(image.convert("RGB"), return_tensors="pt")
        return self.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]

    def kept_embeds(self, embeds: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """A row ends with its newline if any of its tokens is kept, or if it has none."""
        newline = (embeds == self.model.model.image_newline).all(dim=1).tolist()
        vision = self.model.config.vision_config
        overview = (vision.image_size // vision.patch_size) ** 2
        wanted = set(kept.tolist())
        token, row, out = 0, [], []
        for position, is_newline in enumerate(newline):
            if is_newline:
                if not row or any(row):
                    out.append(position)
                row = []
                continue
            if token in wanted:
                out.append(position)
            if token >= overview:
                row.append(token in wanted)
            token += 1
        return embeds[out]


class InternVLReference(Reference):
    """InternVL in transformers' layout, whose prompts have a token before and one after each image."""

    model_class = InternVLForConditionalGeneration

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.video_token = self.tokenizer.convert_tokens_to_ids("<video>")
        self.media_tokens.append(self.video_token)

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

    def prompt_ids(self, prompt: str, kept: Sequence[int], frames: int = 0) -> list[int]:
        """As `Reference.prompt_ids`. `frames`: of a video, to each of which belong as many tokens as to a tile."""
        before, after = self.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        counts = iter(kept)
        tile = "<video>" * self.model.config.image_seq_length
        video = "\n".join(f"Frame{number + 1}: <img>{tile}</img>" for number in range(frames))
        ids: list[int] = []
        for token in self.tokenizer(prompt)["input_ids"]:
            if token == self.image_token:
                ids += [before, *[token] * next(counts), after]
            elif token == self.video_token:
                ids += self.tokenizer(video, add_special_tokens=False)["input_ids"]
            else:
                ids.append(token)
        return ids

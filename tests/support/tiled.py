"""The families that cut an image into tiles: their checkpoints, their prompts and their references."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.images import sample_images
from tests.support.reference import InternVLReference, LlavaNextReference, Reference
from vllm_vtprune.demo.internvl import write_internvl_checkpoint
from vllm_vtprune.demo.llava_next import write_llava_next_checkpoint


@dataclass(frozen=True)
class Family:
    """A family as the tests see it.

    Attributes:
        image, video: what stands for one in a prompt; no video where the family has none.
        chat_forms: in which its checkpoints are asked about ``{image}`` and ``{text}``.
        modalities: what its prompts may hold, beside text.
        write: writes its checkpoint, into a directory and with an `image_size` of its tiles.
        full_size: the released `image_size`.
        processor, model: names of our classes; without the plugin they are ``stock_processor`` and ``stock_model``.
    """

    name: str
    image: str
    chat_forms: Sequence[str]
    modalities: Mapping[str, int]
    full_size: int
    write: Callable[..., Path]
    reference: type[Reference]
    processor: str
    model: str
    stock_processor: str
    stock_model: str
    video: str = ""

    def ask_about(self, question: str, images: int = 1, before: str = "") -> str:
        """A prompt in the form of the family's checkpoint."""
        return f"{before}USER: " + f"{self.image}\n" * images + f"{question} ASSISTANT:"

    @property
    def engine_options(self) -> dict[str, Any]:
        return {
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 64,  # smaller than any image but the smallest
            "enable_prefix_caching": True,
            "skip_mm_profiling": True,  # a start is quicker without
            "limit_mm_per_prompt": dict(self.modalities),
            "worker_extension_cls": "tests.support.processes.ObservedWorker",
        }


VICUNA = "USER: {image}\n{text} ASSISTANT:"

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llava_next",
            image="<image>",
            chat_forms=(VICUNA, "[INST] {image}\n{text} [/INST]"),
            modalities={"image": 4},
            full_size=336,
            write=write_llava_next_checkpoint,
            reference=LlavaNextReference,
            processor="PrunedLlavaNextProcessor",
            model="vllm_vtprune.plugin.families.llava_next.PrunedLlavaNextForConditionalGeneration",
            stock_processor="LlavaNextMultiModalProcessor",
            stock_model="vllm.model_executor.models.llava_next.LlavaNextForConditionalGeneration",
        ),
        Family(
            name="internvl",
            image="<IMG_CONTEXT>",
            chat_forms=(VICUNA, "<|im_start|>user\n{image}\n{text}<|im_end|>\n<|im_start|>assistant\n"),
            modalities={"image": 4, "video": 1},
            full_size=448,
            write=write_internvl_checkpoint,
            reference=InternVLReference,
            processor="PrunedInternVLProcessor",
            model="vllm_vtprune.plugin.families.internvl.PrunedInternVLForConditionalGeneration",
            stock_processor="InternS1MultiModalProcessor",
            stock_model="vllm.model_executor.models.interns1.InternS1ForConditionalGeneration",
            video="<video>",
        ),
    )
}

SMALL = 112
"""Pixels of the side of tiles of few tokens, so that prompts with four images stay short."""

ASPECTS = ((1, 4), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (4, 1))  # width, height


def picture(index: int, aspect: tuple[int, int], stamp: str = "") -> Image.Image:
    """One of the sample images, of this aspect ratio and some 100,000 pixels."""
    width, height = aspect
    scale = (100_000 / (width * height)) ** 0.5
    return sample_images(index + 1, stamp)[index].resize((round(width * scale), round(height * scale)))


def pictures(indices: Sequence[int], aspects: Sequence[tuple[int, int]], stamp: str = "") -> list[Image.Image]:
    return [picture(index, aspect, stamp) for index, aspect in zip(indices, aspects, strict=True)]

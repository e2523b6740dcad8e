"""The model families as the tests of the engine see them: one row each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from tests.support.engines import BLOCK
from tests.support.images import sample_images
from vllm_vtprune_checkpoints import write_checkpoint


class Turn(NamedTuple):
    """What a user says, after so many images."""

    text: str
    images: int = 0


@dataclass(frozen=True)
class Family:
    """A row. Prompts have the form of the checkpoint's chat template.

    Attributes:
        write: writes its tiny checkpoint into a folder.
        sizes: width and height of a portrait, a landscape and a square, each of more tokens than one step prefills.
        cls: whether its encoder has a CLS token, of which some methods read the attention.
        options: of the engine.
        block: tokens of a block of the prefix cache: more, where layers keep keys of different lengths.
        twin: writes the same weights as transformers has classes for, where it has none for this checkpoint.
        verify: whether it is left to `make verify`, as other tests run nearly the same code.
    """

    name: str
    write: Callable[[Path], Path]
    sizes: tuple[tuple[int, int], ...] = ((200, 400), (420, 210), (280, 280))
    cls: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    block: int = BLOCK
    twin: Callable[[Path], Path] | None = None
    verify: bool = False

    @property
    def engine_options(self) -> dict[str, Any]:
        """Every cache is on, and prefill goes in chunks smaller than an image."""
        return {"max_num_batched_tokens": 64, "skip_mm_profiling": True, **self.options}

    def pictures(self, stamp: str = "") -> list[Image.Image]:
        """Photographs of the family's `sizes`, RGB; with another stamp, others."""
        photographs = [sample_images(9, stamp)[index] for index in (0, 1, 5)]
        return [photo.resize(size) for photo, size in zip(photographs, self.sizes, strict=True)]


def write_intern_s1_checkpoint(directory: Path) -> Path:
    """InternVL's weights under an architecture that vLLM serves with the same class, and that has no family of ours."""
    write_checkpoint("internvl", directory, image_size=112)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": ["InternS1ForConditionalGeneration"]}))
    return directory


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", partial(write_checkpoint, "llava"), cls=True, verify=True),
        Family("llava_next", partial(write_checkpoint, "llava_next", image_size=112), cls=True),
        Family("llava_siglip", partial(write_checkpoint, "llava", siglip=True), verify=True),
        # vLLM takes no image of more tokens than one of 1153 x 944 pixels, here 156; the landscape is scaled to them.
        Family(
            "llava_onevision", partial(write_checkpoint, "llava_onevision"), sizes=((90, 130), (360, 300), (120, 120))
        ),
        Family("internvl", partial(write_checkpoint, "internvl", image_size=112), cls=True),
        Family(
            "internvl_chat",
            partial(write_checkpoint, "internvl_chat", seed=1),  # of 0, an answer holds the token of images
            cls=True,
            options={"trust_remote_code": True},
            twin=partial(write_checkpoint, "internvl", image_size=112, seed=1),
        ),
        Family("generic", write_intern_s1_checkpoint),
        Family("glm4v", partial(write_checkpoint, "glm4v")),
        Family("glm4v_moe", partial(write_checkpoint, "glm4v", moe=True), verify=True),
        # Placeholders overlap: vLLM waits for ever where its encoder cache, as large as a step, holds one image alone.
        Family("gemma3", partial(write_checkpoint, "gemma3"), options={"max_num_batched_tokens": 128}),
        Family("gemma4", partial(write_checkpoint, "gemma4"), block=2 * BLOCK, options={"max_num_batched_tokens": 32}),
        Family(
            "gemma4_large",
            partial(write_checkpoint, "gemma4", large=True),
            options={"max_num_batched_tokens": 32},
            verify=True,
        ),
        Family("idefics3", partial(write_checkpoint, "idefics3")),
        Family("mistral3", partial(write_checkpoint, "mistral3")),
        Family("qwen2_5_vl", partial(write_checkpoint, "qwen2_5_vl")),
        Family("qwen3_vl", partial(write_checkpoint, "qwen3_vl")),
        Family("qwen3_vl_moe", partial(write_checkpoint, "qwen3_vl", size="tiny-moe"), verify=True),
        Family("qwen3_5", partial(write_checkpoint, "qwen3_5", dtype="float32")),
        Family(
            "qwen3_5_moe",
            partial(write_checkpoint, "qwen3_5", size="tiny-moe", dtype="float32"),
            verify=True,
        ),
    )
}


class Chat:
    """Writes prompts as a checkpoint's chat template has them."""

    def __init__(self, checkpoint: Path) -> None:
        has_processor = any(checkpoint.glob("*processor_config.json"))
        reader = AutoProcessor if has_processor else AutoTokenizer
        self._processor = reader.from_pretrained(checkpoint, trust_remote_code=True)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """A conversation of which the last turn is to be answered; the others were, with "A dog."."""
        messages: list[dict[str, Any]] = []
        for text, images in turns:
            content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "A dog."}]})
        prompt: str = self._processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        return prompt

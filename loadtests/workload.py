"""The workload: pictures, questions and policies, determined by a seed."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image

from vllm_vtprune_checkpoints.words import OBJECTS, QUALITIES
from vllm_vtprune_evaluation.messages import Message, data_url, message

POLICIES: tuple[object, ...] = (
    False,
    "quality",
    "balanced",
    "fast",
    {"budget": {"type": "tokens", "keep": 64}},
    {"method": "divprune", "budget": {"type": "ratio", "keep": 0.25}},
)
"""A mix of policies: no pruning, presets, explicit policies."""

PIXELS = (336, 336)
SIZES = ((64, 64), (336, 336), (1024, 768), (768, 1024), (1920, 1080))
"""Width and height in pixels: thumbnail, the encoder's size, photographs, screen."""

LENGTHS = (8, 64, 256)
"""Words of a question."""


def picture(seed: int, size: tuple[int, int] = PIXELS) -> str:
    """Smooth noise, unique to the seed (at least 0), as a data URL of a JPEG file; ``size`` is width and height."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return data_url(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)


def grid_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of the grid that is closest to a square and holds this many tokens."""
    return next((rows, tokens // rows) for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)


def question(random: Random, words: int = 8) -> str:
    """A question about objects.

    Args:
        random: source of the words.
        words: number of words, at least 8; a longer question begins with a description.
    """
    description: list[str] = []
    while len(description) < words - 8:
        description += ["the", random.choice(QUALITIES), random.choice(OBJECTS), "and"]
    text = f"Where is the {random.choice(QUALITIES)} {random.choice(OBJECTS)} in this picture?"
    return " ".join([*description[: max(0, words - 8)], text])


class Conversation:
    """A multi-turn conversation about one picture; starts over with another picture after ``turns``."""

    def __init__(self, random: Random, turns: int = 4, size: tuple[int, int] = PIXELS) -> None:
        """
        Args:
            random: source of pictures and questions.
            turns: questions per picture.
            size: width and height of pictures, in pixels.
        """
        self._random = random
        self._turns = turns
        self._size = size
        self._messages: list[Message] = []

    def ask(self) -> list[Message]:
        """The messages to send next."""
        if len(self._messages) >= 2 * self._turns:
            self._messages = []
        images = [] if self._messages else [picture(self._random.getrandbits(32), self._size)]
        self._messages = [*self._messages, message(question(self._random), images)]
        return self._messages

    def answered(self, text: str | None) -> None:
        """Add the answer to the conversation; None (no answer) ends it."""
        self._messages = [] if text is None else [*self._messages, {"role": "assistant", "content": text}]

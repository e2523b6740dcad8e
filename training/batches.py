"""Batches that depend only on split and step number, so training can resume at any step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.model import GRID, Looks, Packed
from training.tokenizer import EOS_ID, PAD_ID
from vllm_vtprune_evaluation.scenes import (
    FIELDS,
    Question,
    Scene,
    Split,
    ask,
    codes,
    make_scene,
    pack,
    paint,
    patch_labels,
    patches_of,
)
from vllm_vtprune_evaluation.scenes.layout import MOST_COUNTED, Density

Array = NDArray[np.float32]

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # of CLIP's image processor
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
BEFORE = "USER: "
CENTRE, INDEX = list(FIELDS).index("centre"), list(FIELDS).index("index")
READING, COUNTING = 2, 3  # heads supervised on letters and on counted things; 0 and 1 on things
COUNTING_WEIGHT = 4.0  # loss weight of counting targets, which must be even and occur in one of eight questions
LONGEST, SHORTEST = 720.0, 24.0  # range of positions over which a picture's tokens may be spread


@dataclass(frozen=True)
class Batch:
    """The batch of a training step: B scenes of N patches."""

    scenes: list[Scene]
    questions: list[list[Question]]
    codes: Tensor  # (B, N, code_size())
    labels: Tensor  # (B, N, fields)
    text: Packed
    looks: Looks | None
    pixels: Tensor | None  # (B, 3, 336, 336)


class Batches:
    """Makes batches; step n uses the scenes from n * size on."""

    def __init__(self, tokenizer: Any, split: Split) -> None:
        self.split = split
        self._ids = lru_cache(1 << 16)(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self.prefix = torch.tensor(self._ids(BEFORE))  # without BOS, like vLLM's chat endpoint
        self.prefixes = (self.prefix, torch.tensor(tokenizer(BEFORE)["input_ids"]))  # with BOS, like transformers
        self._lock = Lock()  # tokenizers and fonts may not be thread-safe

    def make(
        self,
        number: int,
        size: int,
        questions: int,
        *,
        grid: int = GRID,
        pictures: bool = False,
        repeat: bool = True,
        crowded: bool = False,
    ) -> Batch:
        """Make the batch of a step.

        Args:
            number: the step.
            size: scenes.
            questions: questions per scene.
            grid: patches per side.
            pictures: whether to paint the scenes.
            repeat: whether to repeat questions of a scene that has too few.
            crowded: whether to exclude sparse scenes.
        """
        with self._lock:
            first = number * size
            densities: tuple[Density | None, ...] = ("packed", "packed", "dense") if crowded else (None,)
            scenes = [
                make_scene(self.split, seed, grid=grid, density=densities[seed % len(densities)])
                for seed in range(first, first + size)
            ]
            asked = [pack(scene, questions) if repeat else ask(scene, questions) for scene in scenes]
            labels = np.stack([patch_labels(scene) for scene in scenes])
            packed, starts = self._packed(asked)
            return Batch(
                scenes,
                asked,
                torch.from_numpy(np.stack([codes(label, grid) for label in labels])),
                torch.from_numpy(labels),
                packed,
                self._looks(scenes, labels, asked, starts) if repeat else None,
                torch.stack([pixels(scene) for scene in scenes]) if pictures else None,
            )

    def _packed(self, asked: Sequence[Sequence[Question]]) -> tuple[Packed, list[list[int]]]:
        """Pack each scene's questions into one row; also the index of the last token before each answer."""
        rows = []
        starts: list[list[int]] = []
        targets: list[int] = []
        for questions in asked:
            ids: list[int] = []
            pairs: list[int] = []
            places: list[int] = []
            wanted: list[bool] = []
            starts.append([])
            for pair, question in enumerate(questions):
                prompt, answer = self._ids(f"\n{question.text} ASSISTANT:"), self._ids(f" {question.answer}")
                starts[-1].append(len(ids) + len(prompt) - 1)
                ids += prompt + answer
                pairs += [pair] * (len(prompt) + len(answer))
                places += range(len(prompt) + len(answer))
                wanted += [False] * (len(prompt) - 1) + [True] * (len(answer) + 1)
                targets += [*answer, EOS_ID]
            rows.append((ids, pairs, places, wanted))
        length = max(len(row[0]) for row in rows)
        fill = (PAD_ID, -1, 0, False)
        columns = zip(*rows, strict=True)
        ids_, pairs_, places_, wanted_ = (
            torch.tensor([[*values, *[filler] * (length - len(values))] for values in column])
            for column, filler in zip(columns, fill, strict=True)
        )
        return Packed(ids_, pairs_, places_, wanted_, torch.tensor(targets)), starts

    def _looks(
        self,
        scenes: Sequence[Scene],
        labels: NDArray[np.int64],
        asked: Sequence[Sequence[Question]],
        starts: Sequence[Sequence[int]],
    ) -> Looks:
        """Attention targets during answers.

        One head per thing that the question names (the prompt's start if there is none). For reading, letter by letter.
        For counting, one head on the centres of all counted things, with a share that grows with their number.
        """
        looks: list[tuple[int, int, int, Array]] = []
        for row, (scene, label, questions) in enumerate(zip(scenes, labels, asked, strict=True)):
            patches = {item: patches_of(scene, item) for item in scene.items}
            centre, index = label[:, CENTRE] > 0, label[:, INDEX]
            for question, start in zip(questions, starts[row], strict=True):
                steps = len(self._ids(f" {question.answer}"))
                for head, items in enumerate(question.about):
                    target = np.zeros(len(label), dtype=np.float32)
                    for item in items:
                        target[patches[item]] = 1
                    if question.kind == "reading":
                        first = start + steps - len(question.answer)  # the preceding space is a separate token
                        letters = [target * (index == 1 + letter) for letter in range(len(question.answer))]
                        looks += [(row, first + letter, READING, patch) for letter, patch in enumerate(letters)]
                    elif question.kind == "count":
                        looks.append((row, start, COUNTING, (target * centre / (2 * MOST_COUNTED)).astype(np.float32)))
                    else:
                        if question.kind in ("relation", "position"):  # patches of two things may share a column
                            target = target * centre
                        looks += [(row, start + step, head, target) for step in range(steps)]
        rows_, tokens, heads, targets = zip(*looks, strict=True)
        return Looks(
            torch.tensor(rows_),
            torch.tensor(tokens),
            torch.tensor(heads),
            torch.from_numpy(np.stack(targets)),
            torch.tensor([COUNTING_WEIGHT if head == COUNTING else 1.0 for head in heads]),
        )


def pixels(scene: Scene) -> Tensor:
    """(3, H, W) pixel values, as of CLIP's image processor."""
    values = (np.asarray(paint(scene), dtype=np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def usual_positions(before: int, batch: int, tokens: int) -> Tensor:
    """(batch, tokens) consecutive positions, as in the served model."""
    return (before + torch.arange(tokens, dtype=torch.float32)).expand(batch, tokens)


def random_positions(before: int, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(batch, tokens) positions, spread randomly per picture so that they carry no information; a third are usual.

    All tokens are present: only their positions change.
    """
    unit = torch.rand(batch, 4, generator=generator)
    span = torch.exp(math.log(SHORTEST) + unit[:, :1] * math.log(LONGEST / SHORTEST))
    gaps = torch.where(unit[:, 1:2] < 0.5, -torch.log(torch.rand(batch, tokens, generator=generator) + 1e-6), 1.0)
    spread = before + 64 * unit[:, 2:3] + gaps.cumsum(1) / gaps.sum(1, keepdim=True) * span
    return torch.where(unit[:, 3:] < 1 / 3, usual_positions(before, batch, tokens), spread)

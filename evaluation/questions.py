"""The pictures and questions that methods are measured with: scenes, of a split that training never saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from vllm_vtprune.demo.scenes import Question, Scene, Split, ask, make_scene, paint


@dataclass(frozen=True)
class Picture:
    """A scene, and what is asked about it."""

    scene: Scene
    questions: tuple[Question, ...]

    def paint(self) -> Image.Image:
        """336 x 336 pixels; always the same for a scene."""
        return paint(self.scene)

    def name(self, question: int) -> str:
        """What one of its questions is called in files; the part before the dot is the picture's."""
        return f"{self.scene.seed}.{question}"


def pictures(split: Split, questions: int, first: int = 0) -> Iterator[Picture]:
    """Scenes from number ``first`` on until ``questions`` questions are asked, at most one of each kind a scene."""
    seed = first
    while questions > 0:
        scene = make_scene(split, seed)
        asked = ask(scene, min(9, questions))
        if asked:
            yield Picture(scene, tuple(asked))
        questions -= len(asked)
        seed += 1


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, but for case, spaces at its ends and a full stop."""
    return answer.strip().removesuffix(".").casefold() == expected.casefold()

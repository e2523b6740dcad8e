"""The pictures and questions that methods are measured with: scenes that training never saw, or files of a user's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vllm_vtprune_evaluation.scenes import Question, Scene, Split, ask, make_scene, paint


@dataclass(frozen=True)
class Picture:
    """A picture, and what is asked about it.

    Attributes:
        label: what it is called in files.
        source: the scene, or the file, that it is made from.
        questions: about it; an answer that nobody knows is empty.
    """

    label: str
    source: Scene | Path
    questions: tuple[Question, ...]

    def paint(self) -> Image.Image:
        """The picture; always the same."""
        return paint(self.source) if isinstance(self.source, Scene) else read_image(self.source)

    @property
    def density(self) -> str:
        """How much is in a scene; of files, nobody knows."""
        return self.source.density if isinstance(self.source, Scene) else "unknown"

    def name(self, question: int) -> str:
        """What one of its questions is called in files: `picture_of` finds the picture in it."""
        return f"{self.label}#{question}"


def picture_of(name: str) -> str:
    """The label of the picture that a question of this name is about."""
    return name.rpartition("#")[0]


def pictures(split: Split, questions: int, first: int = 0) -> Iterator[Picture]:
    """Scenes from number ``first`` on until ``questions`` questions are asked, at most one of each kind a scene."""
    seed = first
    while questions > 0:
        scene = make_scene(split, seed)
        asked = ask(scene, min(9, questions))
        if asked:
            yield Picture(str(seed), scene, tuple(asked))
        questions -= len(asked)
        seed += 1


def read_image(file: Path) -> Image.Image:
    """An image file as the server sees it: upright, in RGB, on white.

    Raises:
        OSError: the file cannot be read.
        MediaProblem: the server would not take it.
    """
    from vllm_vtprune_server.images import ImageIntake  # imports vLLM, which takes seconds

    return ImageIntake().load_bytes(file.read_bytes()).media


class SampleError(Exception):
    """A file of questions that cannot be used; the message names the line and what is wrong."""


def read_sample(file: Path) -> list[Picture]:
    """The questions of a file of JSON lines, by picture.

    A line holds ``image`` (a path, from the file's folder), ``question``, and if it is known ``answer``.

    Raises:
        SampleError: the file cannot be read, is empty, or a line holds anything else, or names no file.
    """
    from vllm_vtprune_server.problem import MediaProblem

    asked: dict[str, list[Question]] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SampleError(f"{file}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise SampleError(f"{file}:{number}: is not JSON: {error}") from error
        accepted = 'an object with strings "image" and "question", and if it is known "answer"'
        if (
            not isinstance(entry, dict)
            or not {"image", "question"} <= entry.keys() <= {"image", "question", "answer"}
            or not all(isinstance(value, str) for value in entry.values())
        ):
            raise SampleError(f"{file}:{number}: {line[:80]} is not accepted; expected {accepted}")
        image = file.parent / entry["image"]
        try:
            read_image(image)
        except OSError as error:
            raise SampleError(f"{file}:{number}: image: {error}") from error
        except MediaProblem as problem:
            expected = problem.accepted or "a file that holds an image"
            raise SampleError(f"{file}:{number}: image: {image} {problem}; expected {expected}") from problem
        asked.setdefault(entry["image"], []).append(Question("", entry["question"], entry.get("answer", "")))
    if not asked:
        raise SampleError(f"{file}: holds no question")
    return [Picture(image, file.parent / image, tuple(questions)) for image, questions in asked.items()]


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, but for case, spaces at its ends and a full stop."""
    return plain(answer) == plain(expected)


def plain(answer: str) -> str:
    """An answer without what does not matter in it: case, spaces at its ends, a full stop."""
    return answer.strip().removesuffix(".").casefold()

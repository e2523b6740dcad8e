"""Pictures and questions to measure methods with: scenes that training never saw, or the user's own files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vllm_vtprune_evaluation.scenes import Question, Scene, Split, ask, make_scene, paint


@dataclass(frozen=True)
class Picture:
    """A picture and its questions.

    Attributes:
        label: its name in files.
        source: the scene or the image file.
        questions: the questions; an unknown answer is empty.
    """

    label: str
    source: Scene | Path
    questions: tuple[Question, ...]

    def paint(self) -> Image.Image:
        """The image; the same on every call."""
        return paint(self.source) if isinstance(self.source, Scene) else read_image(self.source)

    @property
    def density(self) -> str:
        """The density of a scene; "unknown" for a file."""
        return self.source.density if isinstance(self.source, Scene) else "unknown"

    def name(self, question: int) -> str:
        """The name of a question in files; `picture_of` is the inverse."""
        return f"{self.label}#{question}"


def picture_of(name: str) -> str:
    """The label of the picture, from the name of a question."""
    return name.rpartition("#")[0]


def pictures(split: Split, questions: int, first: int = 0) -> Iterator[Picture]:
    """Scenes from number ``first`` on, until they have ``questions`` questions; at most one of each kind per scene."""
    seed = first
    while questions > 0:
        scene = make_scene(split, seed)
        asked = ask(scene, min(9, questions))
        if asked:
            yield Picture(str(seed), scene, tuple(asked))
        questions -= len(asked)
        seed += 1


def read_image(file: Path) -> Image.Image:
    """Read an image file as the server does: upright, in RGB, on white.

    Raises:
        OSError: the file cannot be read.
        MediaProblem: the server would reject it.
    """
    from vllm_vtprune_server.images import ImageIntake  # imports vLLM, which takes seconds

    return ImageIntake().load_bytes(file.read_bytes()).media


class SampleError(Exception):
    """A file of questions is invalid; the message names the line and the problem."""


def read_sample(file: Path) -> list[Picture]:
    """Read questions from a file of JSON lines, grouped by picture.

    A line holds ``image`` (a path relative to the file's folder), ``question``, and optionally ``answer``.

    Raises:
        SampleError: the file cannot be read or is empty, or a line is invalid or names no readable image.
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
    """Whether an answer is the expected one, ignoring case, outer spaces and a full stop."""
    return plain(answer) == plain(expected)


def plain(answer: str) -> str:
    """An answer without case, outer spaces and a full stop."""
    return answer.strip().removesuffix(".").casefold()

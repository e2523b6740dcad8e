"""The pictures and questions of a benchmark, each picture as often new to the server as needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vllm_vtprune_evaluation.scenes import ask, make_scene, paint

ENDINGS = frozenset(Image.registered_extensions())


class NoPictures(Exception):
    """A folder without pictures, or with a file that is none; the message names it."""


@dataclass(frozen=True)
class Subject:
    """A picture and a question about it.

    Attributes:
        label: name of the picture.
        data: bytes of the image file.
        kind: its MIME type.
        question: the question.
        answer: the right answer; empty if nobody knows it.
    """

    label: str
    data: bytes
    kind: str
    question: str
    answer: str = ""

    def url(self, copy: str) -> str:
        """The picture as a data URL.

        Args:
            copy: for the same picture, another text makes another file of the same pixels, which no cache knows.
                Decoders ignore what follows the end of an image.
        """
        return f"data:{self.kind};base64,{base64.b64encode(self.data + copy.encode()).decode()}"


def files(folder: Path, question: str, most: int) -> list[Subject]:
    """The first image files of a folder, in alphabetical order, and one question about each.

    Raises:
        NoPictures: there is none, or a file cannot be read.
    """
    subjects = []
    try:
        named = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)[:most]
        for file in named:
            with Image.open(file) as image:
                kind = Image.MIME.get(image.format or "", "image/png")
            subjects.append(Subject(file.name, file.read_bytes(), kind, question))
    except OSError as error:
        raise NoPictures(f"--images: {error}; expected a folder of image files") from error
    if not subjects:
        raise NoPictures(f"--images: {folder} holds no picture; expected files such as .jpg or .png")
    return subjects


def scenes(most: int) -> list[Subject]:
    """Generated scenes of the test split, as they are, one question about each."""
    return [
        Subject(f"scene {seed}", _file(picture, "PNG"), "image/png", question, answer)
        for seed, picture, question, answer in _scenes(most)
    ]


def generated(most: int, sizes: Sequence[tuple[int, int]]) -> list[Subject]:
    """Generated scenes as photographs of these sizes (width, height), in turns."""
    out = []
    for index, (seed, picture, question, _) in enumerate(_scenes(most)):
        size = sizes[index % len(sizes)]
        scaled = picture.resize(size, Image.Resampling.BICUBIC)
        out.append(Subject(f"scene {seed}, {size[0]} x {size[1]}", _file(scaled, "JPEG"), "image/jpeg", question))
    return out


def _scenes(most: int) -> Iterator[tuple[int, Image.Image, str, str]]:
    seed = 0
    while most:
        scene = make_scene("test", seed)
        questions = ask(scene)
        if questions:
            question = questions[seed % len(questions)]
            yield seed, paint(scene), question.text, question.answer
            most -= 1
        seed += 1


def _file(image: Image.Image, encoding: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, quality=90)
    return buffer.getvalue()

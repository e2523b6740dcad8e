"""Every answer that was given, in a file that grows: a run that is stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from vllm_vtprune.text import text_pipeline_name
from vllm_vtprune_evaluation.arms import Arm
from vllm_vtprune_evaluation.options import weights_digest
from vllm_vtprune_evaluation.questions import Picture

CODE = (
    "vllm_vtprune",
    "vllm_vtprune.selectors",
    "vllm_vtprune.plugin.families",
    "vllm_vtprune.plugin.vision",
    "vllm_vtprune_evaluation.scenes",
    "vllm_vtprune_evaluation.forward",
    "vllm_vtprune_evaluation.in_llm",
    "vllm_vtprune_evaluation.merged",
    "vllm_vtprune_evaluation.offline",
)
"""Packages and modules whose code decides on answers: what others of it gave is not gone on with."""


@dataclass(frozen=True)
class Answer:
    """One question, asked in one way.

    Attributes:
        question: its name.
        kind: of question.
        density: of the picture.
        text: the answer.
        right: whether it is.
        tokens: visual tokens that the language model read, on average over its layers.
    """

    question: str
    kind: str
    density: str
    text: str
    right: bool
    tokens: float


def subject(model: str, served_as: str, asked: Sequence[Picture]) -> dict[str, str]:
    """What answers depend on, beside the question and the way of pruning.

    Args:
        model: a directory, or a name on the hub.
        served_as: the arithmetic: a dtype of a server, the address of a server of the user's, or that of no server.
        asked: the pictures; of scenes, how many does not matter.
    """
    code = hashlib.sha256()
    for name in CODE:
        for file in _sources(name):
            code.update(file.read_bytes())
    for picture in asked:
        if isinstance(picture.source, Path):
            code.update(repr((picture.label, picture.questions)).encode() + picture.source.read_bytes())
    splits = {"none" if isinstance(picture.source, Path) else picture.source.split for picture in asked}
    return {
        "model": weights_digest(model),
        "split": ", ".join(sorted(splits)),
        "served as": served_as,
        "text pipeline": text_pipeline_name(),
        "code": code.hexdigest()[:16],
    }


def _sources(name: str) -> list[Path]:
    """The files of a package, or of a module."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin)
    return sorted(file.parent.glob("*.py")) if spec.submodule_search_locations else [file]


class AnswersError(Exception):
    """A file of answers that cannot be gone on with; the message says why."""


class Answers:
    """The answers so far, by arm and question, kept in a file of JSON lines.

    The first line says what all answers depend on: the model and the questions. An arm whose policy changes begins
    anew, since its answers are kept by policy too.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        """Read a file, or begin one.

        Raises:
            AnswersError: its answers are of another subject, or it holds anything else.
        """
        self._found: dict[tuple[str, str], dict[str, Answer]] = {}
        whole: list[str] = []
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines) - 1:  # cut off when the process was killed
                    break
                raise AnswersError(f"{path}:{number + 1}: is not JSON: give --out another folder") from error
            whole.append(line)
            if number > 0:
                self._note(entry.pop("arm"), entry.pop("policy"), Answer(**entry))
            elif entry != subject:
                raise AnswersError(
                    f"{path} holds answers of {entry}, and these would be of {dict(subject)}: give --out another folder"
                )
        whole = whole or [json.dumps(subject)]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in whole))
        fresh.replace(path)
        self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def has(self, arm: Arm, question: str) -> bool:
        """Whether the question was asked in this way."""
        return question in self._found.get((arm.name, arm.digest()), {})

    def add(self, arm: Arm, answer: Answer) -> None:
        """Keep an answer."""
        self._note(arm.name, arm.digest(), answer)
        print(json.dumps({"arm": arm.name, "policy": arm.digest(), **asdict(answer)}), file=self._file, flush=True)

    def of(self, arm: Arm) -> Mapping[str, Answer]:
        """All answers of an arm, by question."""
        return self._found.get((arm.name, arm.digest()), {})

    def __iter__(self) -> Iterator[Answer]:
        return (answer for answers in self._found.values() for answer in answers.values())

    def _note(self, arm: str, policy: str, answer: Answer) -> None:
        self._found.setdefault((arm, policy), {})[answer.question] = answer

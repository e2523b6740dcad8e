"""All answers in an append-only file, so that an interrupted run can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
    "vllm_vtprune_evaluation.photo",
)
"""Packages and modules whose code affects answers; a run does not resume answers of other code."""


@dataclass(frozen=True)
class Answer:
    """The answer to one question under one arm.

    Attributes:
        question: name of the question.
        kind: kind of question.
        density: density of the picture.
        text: the answer.
        right: whether the answer is right.
        tokens: visual tokens that the language model read, mean over its layers.
    """

    question: str
    kind: str
    density: str
    text: str
    right: bool
    tokens: float


def subject(model: str, served_as: str, pictures: Sequence[Picture]) -> dict[str, str]:
    """Everything that answers depend on besides question and policy.

    Args:
        model: a directory, or a name on the hub.
        served_as: dtype of our server, URL of the user's server, or `offline.SERVED_AS`.
        pictures: the pictures; the number of scenes does not matter.
    """
    code = hashlib.sha256()
    for name in CODE:
        for file in _sources(name):
            code.update(file.read_bytes())
    for picture in pictures:
        if isinstance(picture.source, Path):
            code.update(repr((picture.label, picture.questions)).encode() + picture.source.read_bytes())
    splits = {"none" if isinstance(picture.source, Path) else picture.source.split for picture in pictures}
    return {
        "model": weights_digest(model),
        "split": ", ".join(sorted(splits)),
        "served as": served_as,
        "text pipeline": text_pipeline_name(),
        "code": code.hexdigest()[:16],
    }


def _sources(name: str) -> list[Path]:
    """Source files of a package or module."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin)
    return sorted(file.parent.glob("*.py")) if spec.submodule_search_locations else [file]


class AnswersError(Exception):
    """A file of answers that cannot be resumed; the message gives the reason."""


class Answers:
    """All answers by arm and question, stored as JSON lines.

    The first line is the `subject`. Answers are stored by policy, so an arm with a changed policy starts over.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        """Read or create a file.

        Raises:
            AnswersError: the file has another subject, or is not a file of answers.
        """
        self._answers: dict[tuple[str, str], dict[str, Answer]] = {}
        valid_lines: list[str] = []
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines) - 1:  # truncated when the process was killed
                    break
                raise AnswersError(f"{path}:{number + 1}: is not JSON; choose another folder") from error
            valid_lines.append(line)
            if number > 0:
                self._note(entry.pop("arm"), entry.pop("policy"), Answer(**entry))
            elif entry != subject:
                raise AnswersError(f"{path} holds answers of {entry}, expected {dict(subject)}; choose another folder")
        valid_lines = valid_lines or [json.dumps(subject)]
        new_file = path.with_suffix(".new")
        new_file.write_text("".join(f"{line}\n" for line in valid_lines))
        new_file.replace(path)
        self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def has(self, arm: Arm, question: str) -> bool:
        """Whether the question was answered under this arm."""
        return question in self._answers.get((arm.name, arm.digest()), {})

    def add(self, arm: Arm, answer: Answer) -> None:
        """Store an answer."""
        self._note(arm.name, arm.digest(), answer)
        print(json.dumps({"arm": arm.name, "policy": arm.digest(), **asdict(answer)}), file=self._file, flush=True)

    def of(self, arm: Arm) -> Mapping[str, Answer]:
        """All answers of an arm, by question."""
        return self._answers.get((arm.name, arm.digest()), {})

    def _note(self, arm: str, policy: str, answer: Answer) -> None:
        self._answers.setdefault((arm, policy), {})[answer.question] = answer

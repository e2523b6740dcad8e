"""Scenes as files: a task for lmms-eval, or a sample for `vtprune calibrate`.

    python -m vllm_vtprune_evaluation.export --questions 250 --out build/scenes
    python -m lmms_eval --model async_openai --tasks vtprune_scenes --include_path build/scenes ...
    python -m vllm_vtprune_evaluation.export --split validation --out build/sample
    vtprune calibrate --retain 0.95 --sample build/sample/questions.jsonl ...

The folder holds one PNG per picture, ``questions.jsonl``, and the task for lmms-eval's ``--include_path``. The split
``test`` has the questions of `vtprune eval` with the same ``--questions``, so accuracies are comparable. Do not
calibrate on the split that you report on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

from vllm_vtprune_evaluation.asking import ANSWER_TOKENS
from vllm_vtprune_evaluation.options import count
from vllm_vtprune_evaluation.questions import Picture, pictures

TASK = "vtprune_scenes"

# lmms-eval runs in an environment of its own, without this package: the task is two files that need only Pillow.
TASK_FILE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function {task}.images
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""
IMAGES_FILE = '''\
"""The pictures of a question, for lmms-eval."""

from pathlib import Path

from PIL import Image


def images(doc):
    return [Image.open(Path(__file__).parent / doc["image"]).convert("RGB")]
'''


def export(asked: Iterable[Picture], folder: Path) -> int:
    """Write pictures, their questions and the task into ``folder``; returns the number of questions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for picture in asked:
        file = f"{picture.label}.png"
        picture.paint().save(folder / file)
        lines += [
            json.dumps({"image": file, "question": question.text, "answer": question.answer})
            for question in picture.questions
        ]
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    where = json.dumps(os.fspath(questions.resolve()))  # a JSON string is one of YAML's too
    (folder / f"{TASK}.yaml").write_text(
        TASK_FILE.format(task=TASK, questions=where, tokens=ANSWER_TOKENS), encoding="utf-8"
    )
    (folder / f"{TASK}.py").write_text(IMAGES_FILE, encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_vtprune_evaluation.export", description="Write scenes and questions about them to files."
    )
    parser.add_argument(
        "--split", choices=["test", "validation"], default="test", help="neither was trained on (default: %(default)s)"
    )
    parser.add_argument("--questions", type=count, default=250, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/scenes"), metavar="DIR", help="folder (default: %(default)s)"
    )
    args = parser.parse_args()
    written = export(pictures(args.split, args.questions), args.out)
    print(f"{args.out}: {written} questions, and the lmms-eval task {TASK}")


if __name__ == "__main__":
    main()

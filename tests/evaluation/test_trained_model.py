"""The model that comes with the package sees: it answers held-out questions, in plain transformers."""

from collections import Counter

import pytest

from vllm_vtprune_checkpoints import TRAINED
from vllm_vtprune_evaluation.in_llm import InLLM
from vllm_vtprune_evaluation.questions import is_right, pictures

pytestmark = pytest.mark.verify  # test_offline.py has the demo's answers

QUESTIONS = 60
FLOOR = 0.8  # served, it answers 92 % of 2,000; chance gives a third at best


def test_it_answers_held_out_questions() -> None:
    model = InLLM(TRAINED, add_special_tokens=False)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for picture in pictures("test", QUESTIONS, first=1000):
        image = picture.paint()
        for question in picture.questions:
            asked[question.kind] += 1
            right[question.kind] += is_right(model.answer(image, question.text, None, 12).text, question.answer)
    shares = {kind: right[kind] / asked[kind] for kind in asked}
    assert right.total() >= FLOOR * QUESTIONS, shares

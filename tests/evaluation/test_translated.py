"""The questions about scenes in other languages."""

import pytest

from vllm_vtprune.text import read_prompt
from vllm_vtprune_evaluation.scenes import ask, make_scene
from vllm_vtprune_evaluation.translated import LANGUAGES, translate


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_question_is_translated(language: str) -> None:
    questions = {question.text for seed in range(60) for question in ask(make_scene("validation", seed))}
    assert len(questions) > 200
    for question in questions:
        translated = translate(question, language)
        assert "{" not in translated
        assert read_prompt(translated).fallback == "not_english_all_words", translated


@pytest.mark.parametrize(
    ("language", "translated"),
    [
        ("es", "¿Hay un estrella naranja pero ningún 7 manuscrito?"),
        ("de", "Gibt es ein orange Stern, aber kein handgeschriebene 7?"),
        ("zh", "有没有橙色星形但没有手写的7？"),
    ],
)
def test_word_for_word(language: str, translated: str) -> None:
    assert translate("Is there an orange star but no handwritten 7?", language) == translated


def test_what_is_no_question_about_a_scene() -> None:
    with pytest.raises(ValueError, match="Who is it"):
        translate("Who is it?", "de")

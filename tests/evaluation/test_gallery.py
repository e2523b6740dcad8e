"""The gallery: whose scenes, whose answers, and what is written beside them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm, energy, fixed
from vllm_vtprune_evaluation.gallery import draw_gallery, first_of_each_density, gallery_figure, shown_arms
from vllm_vtprune_evaluation.questions import Picture, pictures
from vllm_vtprune_evaluation.report import BLUE, VERMILLION


def arm(method: str, keep: int, *, adaptive: bool = False, inside: bool = False) -> Arm:
    budget = energy(0.9) if adaptive else fixed(keep)
    name = f"{method}{'+E' if adaptive else ''}@{keep}"
    return Arm(name, {"method": method, "budget": budget}, method, keep, adaptive, inside)


ARMS = [arm("fastervlm", 64), arm("uniform", 100)]
ASKED = list(pictures("test", 90))


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    """Right ones of the unpruned model, and of each arm every other time."""
    with Answers(tmp_path / "answers.jsonl", {}) as kept:
        for place, picture in enumerate(ASKED):
            question, name = picture.questions[0], picture.name(0)
            for turn, variant in enumerate([UNPRUNED, *ARMS]):
                right = variant is UNPRUNED or (place + turn) % 2 == 0
                text = question.answer if right else "none of these at all"
                kept.add(variant, Answer(name, question.kind, picture.density, f" {text}", right, 64))
        yield kept


def test_the_first_scenes_of_each_density_are_shown() -> None:
    shown = first_of_each_density(ASKED)
    assert [picture.density for picture in shown] == ["sparse"] * 2 + ["medium"] * 2 + ["dense"] * 2
    for density in ("sparse", "medium", "dense"):
        first = [picture for picture in ASKED if picture.density == density][:2]
        assert [picture for picture in shown if picture.density == density] == first


def test_where_a_density_is_rare_others_fill_its_place() -> None:
    sparse = [picture for picture in ASKED if picture.density == "sparse"]
    dense = [picture for picture in ASKED if picture.density == "dense"]
    assert first_of_each_density([*dense[:1], *sparse[:5]]) == [*sparse[:5], dense[0]]
    file = Picture("a.png", Path("a.png"), ASKED[0].questions)
    assert first_of_each_density([file, *sparse[:1]]) == [sparse[0], file]


def test_the_default_method_comes_first_and_four_are_shown() -> None:
    scope, resprune, more = arm("scope", 128), arm("resprune", 64), arm("resprune", 128, adaptive=True)
    off, inside = Arm("off", {"method": "none"}, "off"), arm("fastv", 64, inside=True)
    assert shown_arms([inside, off, arm("resize", 64), scope, more, resprune]) == [resprune, more, scope]
    assert shown_arms([arm("dart", keep) for keep in (9, 8, 7, 6, 5)]) == [arm("dart", keep) for keep in (9, 8, 7, 6)]


def lines(axes: Axes) -> list[str]:
    return [" ".join(text.split()) for text in (axes.get_title(), axes.get_xlabel())]


def test_a_row_tells_question_right_answer_and_what_was_answered(answers: Answers) -> None:
    figure = gallery_figure(str(tiny_checkpoint()), "float32", ASKED[:2], ARMS, answers)
    for place, picture in enumerate(ASKED[:2]):
        whole, fastervlm, uniform = figure.axes[3 * place : 3 * place + 3]
        question = picture.questions[0]
        assert lines(whole) == [f"{question.text} right: {question.answer}", f"unpruned: ✓ {question.answer}"]
        assert (np.asarray(whole.get_images()[0].get_array()) == np.asarray(picture.paint())).all()
        wrong, right = (fastervlm, uniform) if place == 0 else (uniform, fastervlm)
        assert lines(wrong)[1] == "✗ none of these at all"
        assert lines(right)[1] == f"✓ {question.answer}"
        assert (wrong.xaxis.label.get_color(), right.xaxis.label.get_color()) == (VERMILLION, BLUE)
        assert lines(fastervlm)[0] == "fastervlm@64 64 of 576 tokens"
        assert lines(uniform)[0] == "uniform@100 100 of 576 tokens"


@pytest.mark.filterwarnings("error")
def test_an_answer_is_shown_as_it_is_but_for_what_cannot_be_shown(tmp_path: Path) -> None:
    """No mathematics, no control characters, two lines."""
    with Answers(tmp_path / "answers.jsonl", {}) as answers:
        for variant, text in ((UNPRUNED, "$\\frac$ 5\x13"), (ARMS[0], "a long answer " * 9)):
            answers.add(variant, Answer(ASKED[0].name(0), "count", "dense", text, False, 64))
        figure = gallery_figure(str(tiny_checkpoint()), "float32", ASKED[:1], ARMS[:1], answers)
    figure.draw_without_rendering()
    whole, pruned = figure.axes
    assert whole.get_xlabel() == "unpruned: ✗ $\\frac$ 5"
    assert pruned.get_xlabel().count("\n") == 1
    assert pruned.get_xlabel().endswith("[...]")


def test_texts_neither_overlap_nor_are_cut_off_and_the_file_is_narrow(answers: Answers, tmp_path: Path) -> None:
    model = str(tiny_checkpoint())
    shown = first_of_each_density(ASKED)
    figure = gallery_figure(model, "float32", shown, ARMS, answers)
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label)]
    assert all(text.get_fontsize() >= 10 for text in texts)
    boxes = [text.get_window_extent() for text in texts]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1

    more = [*ARMS, arm("random", 64), arm("divprune", 64), arm("tome", 64)]
    for picture in shown:
        for variant in more[2:]:
            answers.add(variant, answers.of(UNPRUNED)[picture.name(0)])
    draw_gallery(model, "float32", ASKED, more, answers, tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as drawn:
        assert 1200 < drawn.width <= 1600, "five columns"

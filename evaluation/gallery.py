"""Draw scenes with their kept tokens and answers, arm by arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from vllm_vtprune.plugin.inspection import examine, pruning_processor
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm
from vllm_vtprune_evaluation.questions import Picture
from vllm_vtprune_evaluation.report import BLUE, VERMILLION, save
from vllm_vtprune_evaluation.results import DEFAULT_METHOD
from vllm_vtprune_evaluation.scenes.layout import DENSITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCENES, ARMS = 6, 4
COLUMN, ROW = 2.6, 3.5  # inches
TEXT_SIZE, LETTERS = 11, 30  # points; of a line


def draw_gallery(
    model: str, dtype: str, pictures: Sequence[Picture], arms: Sequence[Arm], answers: Answers, file: Path
) -> None:
    """Draw `first_of_each_density`, each in a row with its first question, and what `shown_arms` keep and answer.

    ``dtype`` is that of the vision encoder; "auto" for the model's own.
    """
    save(gallery_figure(model, dtype, first_of_each_density(pictures), shown_arms(arms), answers), file)


def first_of_each_density(pictures: Sequence[Picture]) -> list[Picture]:
    """At most `SCENES` pictures: as many of each density, those that come first; sparse ones before dense ones."""
    before: Counter[str] = Counter()
    turns = []
    for picture in pictures:
        turns.append((before[picture.density], picture))
        before[picture.density] += 1
    chosen = [picture for _, picture in sorted(turns, key=lambda turn: turn[0])[:SCENES]]
    order: dict[str, int] = {density: place for place, density in enumerate(DENSITIES)}
    return sorted(chosen, key=lambda picture: order.get(picture.density, len(order)))


def shown_arms(arms: Sequence[Arm]) -> list[Arm]:
    """At most `ARMS` of those that choose tokens on the server: the default method first, fixed budgets before "+E"."""
    prune = [arm for arm in arms if not arm.inside and PruningPolicy.parse(arm.policy).selects]
    return sorted(prune, key=lambda arm: (arm.method != DEFAULT_METHOD, arm.adaptive))[:ARMS]


def gallery_figure(
    model: str, dtype: str, pictures: Sequence[Picture], arms: Sequence[Arm], answers: Answers
) -> Figure:
    """All of the pictures and arms; see `draw_gallery`."""
    from matplotlib.figure import Figure

    processor = pruning_processor(model, dtype)
    columns = 1 + len(arms)
    figure = Figure(figsize=(COLUMN * columns, ROW * len(pictures)), layout="constrained")
    grid = figure.subplots(len(pictures), columns, squeeze=False)
    for row, picture in zip(grid, pictures, strict=True):
        question, name, image = picture.questions[0], picture.name(0), picture.paint()
        row[0].imshow(image)
        title = f"{fill(question.text, LETTERS)}\nright: {question.answer}"
        row[0].set_title(title, fontsize=TEXT_SIZE, parse_math=False)
        _answer(row[0], answers.of(UNPRUNED)[name], "unpruned: ")
        for axes, arm in zip(row[1:], arms, strict=True):
            inspection = examine(processor, image, PruningPolicy.parse(arm.policy_for(picture.label)), question.text)
            axes.imshow(inspection.drawn)
            kept = f"{inspection.report.kept_tokens} of {inspection.report.visual_tokens} tokens"
            axes.set_title(f"{arm.name}\n{kept}", fontsize=TEXT_SIZE)
            _answer(axes, answers.of(arm)[name])
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return figure


def _answer(axes: Axes, answer: Answer, before: str = "") -> None:
    """Write an answer below a picture: a blue tick if it is right, a red cross if it is wrong."""
    mark, colour = ("✓", BLUE) if answer.right else ("✗", VERMILLION)
    printable = "".join(letter if letter.isprintable() else " " for letter in answer.text)
    text = fill(f"{before}{mark} {printable.strip()}", LETTERS, max_lines=2)
    axes.set_xlabel(text, fontsize=TEXT_SIZE, color=colour, parse_math=False)

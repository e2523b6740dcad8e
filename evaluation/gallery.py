"""What is kept of some scenes, drawn side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.arms import Arm
from evaluation.questions import Picture
from evaluation.report import save
from vllm_vtprune.inspection import examine, pruning_processor
from vllm_vtprune.policy import PruningPolicy

SCENES = 6


def draw_gallery(model: str, dtype: str, pictures: Sequence[Picture], arms: Sequence[Arm], file: Path) -> None:
    """The first pictures, one in a row with its first question, and what each arm keeps for that question.

    Args:
        model: a directory, or a name on the hub.
        dtype: of its vision encoder; "auto" for the model's own.
        pictures: of which `SCENES` are shown.
        arms: whose policies prune.
        file: where it goes.
    """
    from matplotlib import pyplot

    processor = pruning_processor(model, dtype)
    shown = pictures[:SCENES]
    figure, axes = pyplot.subplots(
        len(shown), 1 + len(arms), figsize=(2.2 * (1 + len(arms)), 2.4 * len(shown)), squeeze=False
    )
    for row, picture in zip(axes, shown, strict=True):
        question, image = picture.questions[0], picture.paint()
        row[0].imshow(image)
        row[0].set_title(question.text, fontsize=6)
        for axis, arm in zip(row[1:], arms, strict=True):
            found = examine(processor, image, PruningPolicy.parse(arm.policy_for(picture.label)), question.text)
            axis.imshow(found.drawn)
            axis.set_title(f"{arm.name}: {found.image['kept_tokens']}", fontsize=6)
        for axis in row:
            axis.set_axis_off()
    save(figure, file)

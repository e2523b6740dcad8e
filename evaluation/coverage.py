"""Which things of a scene the kept tokens cover, by method; explains accuracies without a language model.

    python -m vllm_vtprune_evaluation.coverage --questions 250 --keep 64

Each token of a scene is on a known thing or on empty ground. For each method, means over the questions:

- on things: share of kept tokens whose patch shows a thing
- things seen: share of the scene's things with at least one kept token
- asked, seen: the same, only for the things that the question asks about
- asked, kept: share of these things' tokens that is kept

A merged token counts at its own position.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.plugin.inspection import features_of, plan_of, pruning_processor
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors.registry import SELECTORS
from vllm_vtprune_evaluation.arms import Arm, grid
from vllm_vtprune_evaluation.options import count, embedded_model
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import Picture, pictures
from vllm_vtprune_evaluation.scenes import Question, Scene, patches_of
from vllm_vtprune_evaluation.tables import markdown

HEAD = ("", "on things", "things seen", "asked, seen", "asked, kept")


class Coverage(NamedTuple):
    """Shares between 0 and 1, for one question or averaged over several."""

    on_things: float
    things_seen: float
    asked_seen: float
    asked_kept: float


def coverage(scene: Scene, question: Question, kept: NDArray[np.int64]) -> Coverage | None:
    """What the ``kept`` tokens show; None if the scene has nothing that the question asks about."""
    asked = {id(item): item for items in question.about for item in items}.values()
    if not asked:
        return None
    every = [patches_of(scene, item) for item in scene.items]
    about = [patches_of(scene, item) for item in asked]
    return Coverage(
        on_things=float(np.isin(kept, np.concatenate(every)).mean()),
        things_seen=_seen(every, kept),
        asked_seen=_seen(about, kept),
        asked_kept=float(np.isin(np.concatenate(about), kept).mean()),
    )


def _seen(items: Sequence[NDArray[np.int64]], kept: NDArray[np.int64]) -> float:
    return fmean(bool(np.isin(patches, kept).any()) for patches in items)


def measure(asked: Sequence[Picture], methods: Iterable[str], keep: int) -> dict[str, Coverage]:
    """The mean coverage of each method that supports this budget on the demo model."""
    processor = pruning_processor(embedded_model(), "float32")
    arms: list[Arm] = grid(methods, [keep], {}, features_of(processor, asked[0].paint()))
    coverages: dict[str, list[Coverage]] = defaultdict(list)
    for picture in Progress(asked, desc="encoded", unit="pictures"):
        assert isinstance(picture.source, Scene)
        image = picture.paint()
        for arm in arms:
            policy = PruningPolicy.parse(arm.policy_for(picture.label))
            for question in picture.questions:
                _, plan, _ = plan_of(processor, image, policy, question.text)
                covered = coverage(picture.source, question, plan.kept.numpy())
                if covered is not None:
                    coverages[arm.method].append(covered)
    return {method: Coverage(*map(fmean, zip(*rows, strict=True))) for method, rows in coverages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_vtprune_evaluation.coverage",
        description="Mean share of held-out scenes that each method keeps.",
    )
    parser.add_argument("--questions", type=count, default=250, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--keep", type=count, default=64, metavar="K", help="tokens of a picture (default: %(default)s)"
    )
    args = parser.parse_args()
    rows = measure(list(pictures("test", args.questions)), SELECTORS, args.keep)
    best_first = sorted(rows.items(), key=lambda row: -row[1].asked_kept)
    print(markdown(HEAD, ([f"`{method}`", *(f"{100 * share:.0f} %" for share in row)] for method, row in best_first)))


if __name__ == "__main__":
    main()

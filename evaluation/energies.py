"""Whether an energy budget pays, and why: answers at many budgets, and the tokens that each spectrum would keep.

    python -m vllm_vtprune_evaluation.energies --questions 420 --seed 1000 --out build/energies

Ask the questions of the validation split at each budget of `KEEPS`, offline. These answers score any rule that chooses
a budget per picture, without asking again; between two budgets they are interpolated. Print two tables:

- answers lost, by budget and density: what an adaptive budget can gain;
- for three kinds of features (as in the paper; mean-centred; minus the mean over pictures at each position): the mean
  tokens that one threshold keeps at each density, and the difference of right answers from the fixed budget of equal
  mean, with a 95 % interval over pictures.

Also write both to ``energies.json``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_vtprune.budget import exact_spectrum
from vllm_vtprune.plugin.inspection import features_of, pruning_processor
from vllm_vtprune_evaluation.answers import Answers, subject
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm, fixed
from vllm_vtprune_evaluation.offline import SERVED_AS, answer_offline
from vllm_vtprune_evaluation.options import count, embedded_model, make_folder
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import Picture, picture_of, pictures
from vllm_vtprune_evaluation.tables import markdown
from vllm_vtprune_evaluation.thresholds import Measured, threshold_for

KEEPS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320)
MEANS = (32, 48, 64, 96, 128)
DENSITIES = ("sparse", "medium", "dense")
RESAMPLES = 2000

Floats = NDArray[np.float64]
Table = list[list[str]]  # head first


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_vtprune_evaluation.energies",
        description="Whether energy budgets pay on the demo model.",
    )
    parser.add_argument("--questions", type=count, default=420, metavar="N", help="questions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="number of the first scene (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/energies"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    make_folder(args.out, "--out")
    model = embedded_model()
    asked = list(pictures("validation", args.questions, args.seed))
    right = ask(model, asked, args.out)
    tables = {"density": by_density(asked, right), "spectra": by_spectrum(asked, right, features(model, asked))}
    (args.out / "energies.json").write_text(json.dumps(tables, indent=1) + "\n")
    for head, *rows in tables.values():
        print(markdown(head, rows))


def ask(model: str, asked: Sequence[Picture], directory: Path) -> dict[str, Floats]:
    """Number of right answers by picture label: at each budget of `KEEPS`, then unpruned."""
    arms = [*(Arm(f"resprune@{keep}", {"budget": fixed(keep)}, "resprune", keep) for keep in KEEPS), UNPRUNED]
    with Answers(directory / "answers.jsonl", subject(model, SERVED_AS, asked)) as answers:
        answer_offline(model, asked, arms, answers)
        right: dict[str, Floats] = defaultdict(lambda: np.zeros(len(arms)))
        for column, arm in enumerate(arms):
            for name, answer in answers.of(arm).items():
                right[picture_of(name)][column] += answer.right
    return right


def features(model: str, asked: Sequence[Picture]) -> list[Tensor]:
    """The encoder's features ``(N, d_v)`` of each picture."""
    processor = pruning_processor(model, "float32")
    return [
        features_of(processor, picture.paint()).encoder.float()
        for picture in Progress(asked, desc="encoded", unit="pictures")
    ]


def right_at(right: Floats, keep: float) -> float:
    """Right answers about a picture at a budget, interpolated."""
    return float(np.interp(keep, KEEPS, right[:-1]))


def by_density(asked: Sequence[Picture], right: Mapping[str, Floats]) -> Table:
    """Points of accuracy lost at each budget, in pictures of each density and in all."""
    rows = []
    for density in (*DENSITIES, "all"):
        group = [picture for picture in asked if density in (picture.density, "all")]
        questions = sum(len(picture.questions) for picture in group)
        shares = 100 * sum(right[picture.label] for picture in group) / questions
        assert isinstance(shares, np.ndarray)
        rows.append(
            [f"{density} ({len(group)})", f"{shares[-1]:.1f} %", *(f"{lost:+.1f}" for lost in shares[:-1] - shares[-1])]
        )
    return [["pictures", "unpruned", *map(str, KEEPS)], *rows]


def by_spectrum(asked: Sequence[Picture], right: Mapping[str, Floats], encoded: Sequence[Tensor]) -> Table:
    """Tokens that one threshold of each kind of energy keeps, and the points gained over a fixed budget."""
    common = torch.stack(list(encoded)).mean(dim=0)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "as in the paper": lambda rows: rows,
        "mean-centred": lambda rows: rows - rows.mean(dim=0),
        "less what all pictures share at a place": lambda rows: rows - common,
    }
    questions = np.array([len(picture.questions) for picture in asked])
    rows = []
    for kind, change in kinds.items():
        measured = [
            Measured(exact_spectrum(change(rows)), len(rows), len(rows), len(picture.questions))
            for picture, rows in zip(asked, encoded, strict=True)
        ]
        for mean in MEANS:
            threshold = threshold_for(measured, mean)
            if threshold is None:
                continue
            kept = np.array([picture.kept(threshold) for picture in measured])
            gained = np.array(
                [right_at(right[p.label], k) - right_at(right[p.label], mean) for p, k in zip(asked, kept, strict=True)]
            )
            low, high = interval(gained, questions)
            tokens = [kept[[picture.density == density for picture in asked]].mean() for density in DENSITIES]
            points = 100 * gained.sum() / questions.sum()
            rows.append(
                [
                    f"{kind}, {threshold:.4f}",
                    str(mean),
                    *(f"{mean_tokens:.0f}" for mean_tokens in tokens),
                    f"{points:+.1f} ({low:+.1f} to {high:+.1f})",
                ]
            )
    return [["energy, threshold", "mean tokens", *DENSITIES, "points less fixed"], *rows]


def interval(gained: Floats, questions: NDArray[np.int64]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the points gained, over pictures."""
    draws = np.random.default_rng(0).integers(0, len(gained), (RESAMPLES, len(gained)))
    points = 100 * gained[draws].sum(axis=1) / questions[draws].sum(axis=1)
    low, high = np.percentile(points, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()

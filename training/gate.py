"""Whether answers depend on where tokens are numbered, which pruning changes, rather than on what they show."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from training.batches import Batches, usual_positions
from training.stages import Trainee, answer_accuracy

ALLOWED = 0.01  # of accuracy
# By how much, and how many times as far apart: 0.2 as if 115 tokens were left, 0.05 as if 29 were.
NUMBERINGS = ((0, 1.0), (100, 1.0), (500, 1.0), (0, 1.25), (0, 0.5), (0, 0.2), (0, 0.05))


def position_gate(
    trainee: Trainee, batches: Batches, scenes: int, device: torch.device, *, pictures: bool = True
) -> dict[str, float]:
    """Accuracy without pruning where the visual tokens are numbered otherwise.

    "worst" is the largest distance from the usual numbering's; the gate is passed where it is at most ALLOWED.
    """
    accuracy = {}
    for shift, stretch in NUMBERINGS:
        positions = partial(moved, shift=shift, stretch=stretch)
        scores = answer_accuracy(trainee, batches, scenes, device, pictures=pictures, positions=positions)
        accuracy[f"shift {shift}, stretch {stretch}"] = scores["all"]
    usual, *others = accuracy.values()
    return accuracy | {"worst": max(abs(other - usual) for other in others)}


def moved(before: int, batch: int, tokens: int, *, shift: int, stretch: float) -> Tensor:
    """(batch, tokens): the usual positions, spread by `stretch` and moved by `shift`."""
    usual = usual_positions(before, batch, tokens)
    return before + shift + stretch * (usual - before)

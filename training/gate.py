"""Check that answers do not depend on the visual tokens' positions, which pruning changes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from training.batches import Batches, usual_positions
from training.stages import Trainee, answer_accuracy

ALLOWED = 0.01  # accepted change of accuracy
# (shift, stretch); stretch 0.2 corresponds to 115 kept tokens, 0.05 to 29
NUMBERINGS = ((0, 1.0), (100, 1.0), (500, 1.0), (0, 1.25), (0, 0.5), (0, 0.2), (0, 0.05))


def position_gate(trainee: Trainee, batches: Batches, scenes: int, device: torch.device) -> dict[str, float]:
    """Unpruned accuracy on pictures under other positions of the visual tokens.

    "worst" is the largest difference from the usual positions; the gate passes if it is at most ALLOWED.
    """
    accuracy = {}
    for shift, stretch in NUMBERINGS:
        positions = partial(moved, shift=shift, stretch=stretch)
        scores = answer_accuracy(trainee, batches, scenes, device, pictures=True, positions=positions)
        accuracy[f"shift {shift}, stretch {stretch}"] = scores["all"]
    usual, *others = accuracy.values()
    return accuracy | {"worst": max(abs(other - usual) for other in others)}


def moved(before: int, batch: int, tokens: int, *, shift: int, stretch: float) -> Tensor:
    """(batch, tokens) usual positions, stretched and shifted."""
    usual = usual_positions(before, batch, tokens)
    return before + shift + stretch * (usual - before)

"""The number of steps of each stage."""

from __future__ import annotations

from typing import NamedTuple

from training.model import GRID
from training.stages import Phase, Stage


class Part(NamedTuple):
    """A share of a stage's time, on one size of canvas."""

    grid: int
    size: int  # scenes per step
    share: float  # of the stage's time
    seconds: float  # per step: on one core for language and tower, which run side by side, on two for joint


PARTS: dict[str, tuple[Part, ...]] = {
    "language": (
        Part(8, 8, 0.25, 1.6),
        Part(12, 8, 0.25, 1.75),
        Part(16, 8, 0.2, 2.2),
        Part(GRID, 4, 0.3, 1.7),
    ),
    "tower": (Part(GRID, 4, 1.0, 0.92),),
    "joint": (Part(GRID, 8, 1.0, 2.7),),
}
RATES = {"language": 3e-3, "tower": 3e-3, "joint": 6e-4}  # peaks
JOINT = 0.35  # share of the time


def stages(hours: float, rate: float = 1.0) -> dict[str, Stage]:
    """The plan for a number of hours on two cores. It fixes the steps: on other machines they take longer or shorter.

    Args:
        hours: time for all stages.
        rate: factor of the learning rates; below 1 to start from an earlier model.
    """
    plan = {}
    for name, parts in PARTS.items():
        seconds = 3600 * hours * (JOINT if name == "joint" else 1 - JOINT)
        phases = tuple(
            Phase(part.grid, max(10, round(seconds * part.share / part.seconds / 10) * 10), part.size) for part in parts
        )
        plan[name] = Stage(name, phases, rate * RATES[name], parts=2 if name == "joint" else 1)
    return plan

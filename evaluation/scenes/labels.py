"""What each patch of a scene shows: as labels to train a vision encoder on, and as vectors that stand in for one.

The code of a patch holds kind, colour, shape and character of its thing, whether the patch is the thing's centre, and
its own row and column. Pruning renumbers prompt positions, so a model must not infer these from a token's index.
"""

import math
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune_evaluation.scenes.layout import COLOURS, PATCH, SHAPES, Item, Scene

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PATCH_KINDS = ("empty", "shape", "digit", "letter", "numeral")

# A label is the index of a value. "none" is not part of the code: an empty patch has little more than its position.
FIELDS: dict[str, tuple[str, ...]] = {
    "kind": PATCH_KINDS,
    "colour": ("none", *COLOURS),
    "shape": ("none", *SHAPES),
    "character": ("none", *CHARACTERS),
    "index": ("none", "1", "2", "3", "4", "5"),  # of the character in its word
    "last": ("none", "last"),  # whether it is the last one
    "mark": ("none", *COLOURS),  # colour of a dot
    "centre": ("none", "centre"),  # of a shape, a digit or a character
}
WAVES = (1, 2, 4, 8)  # half waves of a code of position across the picture
POSITION_SCALE = 0.25  # so that tokens differ by what they show more than by where they are
POSITION_SIZE = 2 * (1 + 2 * len(WAVES))


def code_size() -> int:
    """Numbers in the code of a patch."""
    return sum(len(values) - ("none" in values) for values in FIELDS.values()) + POSITION_SIZE


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """(grid * grid, fields), row by row: the index of the value of each field of FIELDS, for each patch."""
    labels = np.zeros((scene.grid, scene.grid, len(FIELDS)), dtype=np.int64)
    for item in scene.items:
        if item.kind in ("word", "number"):
            _label_text(labels, item)
        else:
            _label_thing(labels, item)
    return labels.reshape(-1, len(FIELDS))


def patches_of(scene: Scene, item: Item) -> NDArray[np.int64]:
    """(patches,): indices of the patches that show an item."""
    alone = patch_labels(replace(scene, items=(item,)))
    return alone[:, 0].nonzero()[0]


def codes(labels: NDArray[np.int64], grid: int) -> NDArray[np.float32]:
    """(grid * grid, code_size()): each field as a one-hot block, all zeros for "none", then the position."""
    blocks = [
        np.eye(len(values), dtype=np.float32)[labels[:, column], "none" in values :]
        for column, values in enumerate(FIELDS.values())
    ]
    return np.concatenate([*blocks, position_codes(grid)], axis=1)


@cache
def position_codes(grid: int) -> NDArray[np.float32]:
    """(grid * grid, POSITION_SIZE): row and column of each patch, as waves."""
    along = (np.arange(grid) + 0.5) / grid * 2 - 1  # -1 to 1
    waves = [f(math.pi / 2 * wave * along) for wave in WAVES for f in (np.sin, np.cos)]
    code = np.stack([2 * along, *waves], axis=1)
    rows, columns = np.repeat(code, grid, axis=0), np.tile(code, (grid, 1))
    return (POSITION_SCALE * np.concatenate([rows, columns], axis=1)).astype(np.float32)


def _label_thing(labels: NDArray[np.int64], item: Item) -> None:
    round_ = item.kind == "shape" and item.shape != "square"
    values = (
        PATCH_KINDS.index(item.kind),
        1 + COLOURS.index(item.colour),
        1 + SHAPES.index(item.shape) if item.shape else 0,
        1 + CHARACTERS.index(item.text) if item.text else 0,
    )
    grid = len(labels)
    for row in range(max(0, int(item.top // PATCH)), min(grid - 1, int(item.bottom // PATCH)) + 1):
        for column in range(max(0, int(item.left // PATCH)), min(grid - 1, int(item.right // PATCH)) + 1):
            across = abs((column + 0.5) * PATCH - item.x) / (item.width / 2)
            down = abs((row + 0.5) * PATCH - item.y) / (item.height / 2)
            if (across**2 + down**2 if round_ else max(across, down)) <= 1:
                labels[row, column, :4] = values
            if item.mark and _reaches(item, row, column):
                labels[row, column, :4] = values
                labels[row, column, 6] = 1 + COLOURS.index(item.mark)
    row, column = int(item.y // PATCH), int(item.x // PATCH)
    labels[row, column, :4] = values
    labels[row, column, 7] = 1


def mark_radius(item: Item) -> float:
    """Radius of the dot in the middle of a shape, in pixels."""
    return max(3.5, 0.13 * item.width)


def _reaches(item: Item, row: int, column: int) -> bool:
    """Whether a patch is within half a radius of the dot's centre."""
    across = max(column * PATCH - item.x, 0, item.x - (column + 1) * PATCH)
    down = max(row * PATCH - item.y, 0, item.y - (row + 1) * PATCH)
    return math.hypot(across, down) < 0.5 * mark_radius(item)


def _label_text(labels: NDArray[np.int64], item: Item) -> None:
    grid = len(labels)
    kind = PATCH_KINDS.index("letter" if item.kind == "word" else "numeral")
    centre_row = int(item.y // PATCH)
    rows = [row for row in range(grid) if abs((row + 0.5) * PATCH - item.y) <= item.height / 2 or row == centre_row]

    def values(index: int) -> tuple[int, ...]:
        character = 1 + CHARACTERS.index(item.text[index])
        return kind, 1 + COLOURS.index(item.colour), 0, character, 1 + index, int(index == len(item.text) - 1), 0, 0

    for column in range(max(0, int(item.left // PATCH)), min(grid - 1, int(item.right // PATCH)) + 1):
        index = int(((column + 0.5) * PATCH - item.left) // item.pitch)
        if 0 <= index < len(item.text):
            labels[rows, column] = values(index)
    for index in range(len(item.text)):
        column = int((item.left + (index + 0.5) * item.pitch) // PATCH)
        labels[rows, column] = values(index)
        labels[centre_row, column, 7] = 1

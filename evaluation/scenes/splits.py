"""The splits: digests decide what belongs to training, validation and test, so nothing belongs to two."""

import hashlib
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Literal, TypeVar

from vllm_vtprune_checkpoints import words

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

T = TypeVar("T")


class Draws:
    """Random draws that depend only on the key. Uses `Random.random`, whose sequence Python guarantees."""

    def __init__(self, *key: object) -> None:
        self.unit = Random(" ".join(map(str, key))).random

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.unit() < probability

    def real(self, low: float, high: float) -> float:
        """Uniform between `low` and `high`."""
        return low + (high - low) * self.unit()

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int((high - low + 1) * self.unit())

    def pick(self, items: Sequence[T]) -> T:
        """An item, all equally likely."""
        return items[int(len(items) * self.unit())]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items, in random order."""
        left = list(items)
        return [left.pop(int(len(left) * self.unit())) for _ in range(len(left))]


def split_of(name: str) -> Split:
    """The split of a layout, a word or a number: a quarter is test, an eighth validation."""
    digit = hashlib.sha256(name.encode()).digest()[0] % 8
    return "test" if digit < 2 else "validation" if digit == 2 else "train"


@cache
def english_words(split: Split) -> tuple[str, ...]:
    """English words of three to five letters, in capitals."""
    known = {*words.OBJECTS, *words.QUALITIES, *words.VERBS, *words.RELATIONS, *words.FUNCTION_WORDS}
    capitals = sorted({word.upper() for word in known if 3 <= len(word) <= 5 and word.isalpha()})
    return tuple(word for word in capitals if split_of(word) == split)


def draw_word(draws: Draws, split: Split) -> str:
    """An English word; in training, mostly letters at random, so that reading cannot become guessing."""
    if split != "train" or draws.chance(0.25):
        return draws.pick(english_words(split))
    while True:
        word = "".join(draws.pick("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(draws.whole(3, 5)))
        if split_of(word) == split:
            return word


def draw_number(draws: Draws, split: Split) -> str:
    """A number of two to four digits."""
    while True:
        low = 10 ** draws.whole(1, 3)
        number = str(draws.whole(low, 10 * low - 1))
        if split_of(number) == split:
            return number

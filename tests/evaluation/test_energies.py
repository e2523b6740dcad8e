"""Scoring rules that give pictures budgets: by hand, on pictures whose answers are made up."""

import numpy as np
import pytest
import torch

from vllm_vtprune_evaluation.energies import KEEPS, MEANS, by_density, by_spectrum, interval, right_at
from vllm_vtprune_evaluation.questions import Picture
from vllm_vtprune_evaluation.scenes import Question, make_scene

QUESTIONS = 4


def picture(label: str, density: str) -> Picture:
    scene = make_scene("validation", int(label), density=density)  # type: ignore[arg-type]
    return Picture(label, scene, tuple(Question("colour", f"{n}?", "red") for n in range(QUESTIONS)))


@pytest.fixture(scope="module")
def asked() -> list[Picture]:
    return [picture("0", "sparse"), picture("1", "medium"), picture("2", "dense")]


def answers(enough: int) -> np.ndarray:
    """All right from `enough` tokens on, none below."""
    return np.array([QUESTIONS * float(keep >= enough) for keep in (*KEEPS, 576)])


def test_between_two_budgets_answers_are_interpolated() -> None:
    right = np.array([float(column) for column in range(len(KEEPS) + 1)])
    assert right_at(right, KEEPS[3]) == 3
    assert right_at(right, (KEEPS[3] + KEEPS[4]) / 2) == 3.5
    assert right_at(right, 1) == 0
    assert right_at(right, 576) == len(KEEPS) - 1


def test_losses_by_density(asked: list[Picture]) -> None:
    right = {"0": answers(8), "1": answers(64), "2": answers(10_000)}
    right["2"][-1] = 2
    head, sparse, medium, dense, everything = by_density(asked, right)
    assert head[2:] == [str(keep) for keep in KEEPS]
    assert sparse[:2] == ["sparse (1)", "100.0 %"]
    assert set(sparse[2:]) == {"+0.0"}
    assert medium[2:] == ["-100.0" if keep < 64 else "+0.0" for keep in KEEPS]
    assert dense[1:3] == ["50.0 %", "-50.0"]
    assert everything[0] == "all (3)"


def test_a_budget_that_follows_the_picture_gains_where_pictures_differ(asked: list[Picture]) -> None:
    """A picture of few directions needs few tokens, one of many needs many: a fixed budget fails the second."""
    generator = torch.Generator().manual_seed(0)
    encoded = [torch.zeros(200, 160) for _ in asked]
    for features, directions in zip(encoded, (8, 40, 140), strict=True):
        features[:, :directions] = torch.randn(200, directions, generator=generator)
    right = {"0": answers(8), "1": answers(32), "2": answers(96)}
    head, *rows = by_spectrum(asked, right, encoded)
    assert head[1] == "mean tokens"
    paper = {row[1]: row for row in rows if row[0].startswith("as in the paper")}
    assert {int(mean) for mean in paper} <= set(MEANS)
    sparse, medium, dense = map(int, paper["48"][2:5])
    assert sparse < medium < dense
    assert paper["48"][5].startswith("+")


def test_an_interval_of_equal_gains_is_a_point() -> None:
    assert interval(np.ones(5), np.full(5, 4)) == (25.0, 25.0)

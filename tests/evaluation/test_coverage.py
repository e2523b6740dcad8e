"""What of a scene the kept tokens show."""

import numpy as np
import pytest

from vllm_vtprune_evaluation.coverage import coverage, measure
from vllm_vtprune_evaluation.questions import pictures
from vllm_vtprune_evaluation.scenes import Item, Question, Scene, make_scene, patch_labels, patches_of


@pytest.fixture(scope="module")
def scene() -> Scene:
    return next(scene for scene in (make_scene("test", seed) for seed in range(99)) if len(scene.items) >= 3)


def about(*items: Item) -> Question:
    return Question("colour", "What colour is it?", "red", (items,))


def test_all_that_is_kept_is_on_the_thing_that_is_asked_about(scene: Scene) -> None:
    item = scene.items[1]
    shown = coverage(scene, about(item), patches_of(scene, item))
    assert shown is not None
    assert (shown.on_things, shown.asked_seen, shown.asked_kept) == (1.0, 1.0, 1.0)
    assert 0 < shown.things_seen <= 1


def test_empty_ground_shows_nothing(scene: Scene) -> None:
    ground = np.flatnonzero(patch_labels(scene)[:, 0] == 0)
    assert coverage(scene, about(*scene.items), ground) == (0.0, 0.0, 0.0, 0.0)


def test_half_of_one_thing_and_as_much_ground(scene: Scene) -> None:
    item, other = scene.items[0], scene.items[2]
    patches, ground = patches_of(scene, item), np.flatnonzero(patch_labels(scene)[:, 0] == 0)
    half = patches[: max(1, len(patches) // 2)]
    kept = np.concatenate([half, ground[: len(half)]])
    shown = coverage(scene, about(item, other), kept)
    assert shown is not None
    assert shown.on_things == 0.5
    assert shown.asked_seen == 0.5
    assert shown.asked_kept == len(half) / (len(patches) + len(patches_of(scene, other)))


def test_a_question_about_nothing_that_is_there_does_not_count(scene: Scene) -> None:
    assert coverage(scene, Question("existence", "Is there a dog?", "no"), np.arange(9)) is None


def test_methods_on_held_out_scenes() -> None:
    coverages = measure(list(pictures("test", 6)), ["scope", "last"], 64)
    assert list(coverages) == ["scope", "last"]
    assert coverages["scope"].asked_seen > coverages["last"].asked_seen, "the last tokens are ground more often"

"""The scenes: the same everywhere, apart between splits, with answers that are right and that cannot be guessed."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from vllm_vtprune_evaluation.scenes import (
    FIELDS,
    KINDS,
    PATCH,
    SPLITS,
    Item,
    Question,
    Scene,
    ask,
    code_size,
    codes,
    make_scene,
    pack,
    paint,
    patch_labels,
)
from vllm_vtprune_evaluation.scenes.layout import COLOURS, SHAPES, layout_key
from vllm_vtprune_evaluation.scenes.painting import PHOTOGRAPHS

SCENES = 400


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: [make_scene(split, seed) for seed in range(SCENES)] for split in SPLITS}


@pytest.fixture(scope="module")
def asked(scenes: dict[str, list[Scene]]) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene in scenes["test"] for question in ask(scene)]


def test_scenes_are_still_those_that_models_were_trained_on() -> None:
    """A published accuracy is about these; where they change on purpose, models have to be scored anew."""
    made = [make_scene(split, seed) for split in SPLITS for seed in range(50)]
    described = [str((scene, ask(scene))) for scene in made]
    assert hashlib.sha256("".join(described).encode()).hexdigest()[:16] == "b4ed8731f5a7a9da"


def test_splits_share_no_layout(scenes: dict[str, list[Scene]]) -> None:
    layouts = {split: {layout_key(scene) for scene in scenes[split]} for split in SPLITS}
    for first, second in pairwise([*SPLITS, SPLITS[0]]):
        assert layouts[first].isdisjoint(layouts[second])


def test_splits_share_no_word_and_no_number(scenes: dict[str, list[Scene]]) -> None:
    """Not even in pictures whose words nobody asks about."""
    texts = {
        split: {item.text for scene in scenes[split] for item in scene.items if item.kind in ("word", "number")}
        for split in SPLITS
    }
    assert all(len(words) > 100 for words in texts.values())
    for first, second in pairwise([*SPLITS, SPLITS[0]]):
        assert texts[first].isdisjoint(texts[second])


def test_words_that_are_read_in_the_test_are_not_in_a_long_training(asked: list[tuple[Scene, Question]]) -> None:
    read = {question.answer for _, question in asked if question.kind == "reading"}
    seen = {item.text for seed in range(SCENES, 5 * SCENES) for item in make_scene("train", seed).items}
    assert len(read) > 50
    assert read.isdisjoint(seen)


def test_splits_share_no_background(scenes: dict[str, list[Scene]]) -> None:
    photographs = [set(PHOTOGRAPHS[split]) for split in SPLITS]
    assert sum(map(len, photographs)) == len(set.union(*photographs))
    tones = {split: set() for split in SPLITS}
    for split in SPLITS:
        for scene in scenes[split]:
            if scene.ground == "plain" and len(tones[split]) < 40:
                colour = Counter(paint(scene).getdata()).most_common(1)[0][0]
                tones[split].add(colour)
    for first, second in pairwise([*SPLITS, SPLITS[0]]):
        assert tones[first].isdisjoint(tones[second])


def test_density_goes_from_one_thing_to_dozens(scenes: dict[str, list[Scene]]) -> None:
    for split in SPLITS:
        counts = {density: [] for density in ("sparse", "medium", "dense")}
        for scene in scenes[split]:
            counts[scene.density].append(len(scene.items))
        assert min(map(len, counts.values())) > SCENES / 5, "each density should be common"
        assert min(counts["sparse"]) == 1
        assert max(counts["sparse"]) <= 3 <= min(counts["medium"])
        assert max(counts["dense"]) >= 24
        assert np.mean(counts["dense"]) > 2 * np.mean(counts["medium"])
        full = [np.mean(patch_labels(scene)[:, 0] > 0) for scene in scenes[split]]
        assert np.quantile(full, 0.1) < 0.03
        assert np.quantile(full, 0.9) > 0.25


def test_every_kind_of_ground_thing_and_question_is_common(
    scenes: dict[str, list[Scene]], asked: list[tuple[Scene, Question]]
) -> None:
    assert min(Counter(scene.ground for scene in scenes["test"]).values()) > SCENES / 5
    item_kinds = Counter(item.kind for scene in scenes["test"] for item in scene.items)
    assert min(item_kinds[kind] for kind in ("shape", "digit", "word", "number")) > SCENES / 4
    kinds = Counter(question.kind for _, question in asked)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > len(asked) / 40


def test_a_scene_is_asked_one_question_of_a_kind_and_packs_are_full() -> None:
    for seed in range(50):
        scene = make_scene("train", seed)
        kinds = [question.kind for question in ask(scene)]
        assert 2 <= len(kinds) == len(set(kinds))
        assert len(pack(scene, 24)) == 24
    assert {q.kind for seed in range(50) for q in ask(make_scene("test", seed), kinds=["count"])} == {"count"}


def test_questions_know_the_items_that_they_are_about(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        assert {item for items in question.about for item in items} <= set(scene.items)
        first, *others = question.about
        assert len(others) == (question.kind in ("relation", "two facts"))
        match question.kind:
            case "existence":
                assert bool(first) == (question.answer == "yes")
            case "count":
                assert len(first) == int(question.answer)
            case "two facts":
                assert (bool(others[0]) == ("but no" not in question.text)) == (question.answer == "yes") or not first
            case _:
                assert all(len(items) == 1 for items in question.about)
                [item] = first
                attributes = (item.colour, item.shape, item.text, item.mark)
                assert question.answer in attributes or question.kind in ("position", "relation")


def test_packed_pictures_are_full_of_characters_and_only_on_demand(scenes: dict[str, list[Scene]]) -> None:
    packed = [patch_labels(make_scene("train", seed, density="packed")) for seed in range(20)]
    assert np.mean([labels[:, list(FIELDS).index("character")] > 0 for labels in packed]) > 0.2
    assert "packed" not in {scene.density for split in SPLITS for scene in scenes[split]}


# What a question asks, worked out from its words alone.


def lookup(scene: Scene, words: str) -> list[Item]:
    """What 'red circle', 'circles', 'red shapes', 'handwritten 7', 'word' or 'shape with a red dot' may mean."""
    kind, tests = "shape", []
    if match := re.fullmatch(r"handwritten (\d)", words):
        kind, tests = "digit", [lambda item: item.text == match[1]]
    elif words in ("word", "number"):
        kind = words
    elif match := re.fullmatch(r"shape with an? (\w+) dot", words):
        tests = [lambda item: item.mark == match[1]]
    else:
        for word in words.replace("crosses", "cross").split():
            word = word if word in (*COLOURS, *SHAPES) else word.removesuffix("s")
            if word != "shape":
                assert word in (*COLOURS, *SHAPES), words
                tests.append(lambda item, word=word: word in (item.colour, item.shape))
    return [item for item in scene.items if item.kind == kind and all(test(item) for test in tests)]


def only(scene: Scene, words: str) -> Item:
    items = lookup(scene, words)
    assert len(items) == 1, f"{words!r} should leave no doubt"
    return items[0]


def yes(true: bool) -> str:
    return "yes" if true else "no"


def related(scene: Scene, match: re.Match[str]) -> str:
    first, second = only(scene, match[1]), only(scene, match[3])
    across, down = first.x - second.x, first.y - second.y
    return yes({"left of": across < 0, "right of": across > 0, "above": down < 0, "below": down > 0}[match[2]])


def read(scene: Scene, match: re.Match[str]) -> str:
    (item,) = (i for i in scene.items if i.kind == match[2] and match[1] in (None, i.colour))
    return item.text


def shape_with(scene: Scene, match: re.Match[str]) -> str:
    (item,) = (i for i in scene.of_kind("shape") if match[1] == (i.mark if "dot" in match[0] else i.colour))
    return item.shape


def quarter(scene: Scene, match: re.Match[str]) -> str:
    item = only(scene, match[1])
    return f"{'top' if item.y < 168 else 'bottom'} {'left' if item.x < 168 else 'right'}"


READERS: list[tuple[str, str, Callable[[Scene, re.Match[str]], str]]] = [
    ("two facts", r"Is there an? (.+) and an? (.+)\?", lambda s, m: yes(bool(lookup(s, m[1]) and lookup(s, m[2])))),
    ("two facts", r"Is there an? (.+) but no (.+)\?", lambda s, m: yes(bool(lookup(s, m[1])) and not lookup(s, m[2]))),
    ("existence", r"Is there an? (.+)\?", lambda s, m: yes(bool(lookup(s, m[1])))),
    ("count", r"How many (.+) are there\?", lambda s, m: str(len(lookup(s, m[1])))),
    ("detail", r"What color is the dot on the (.+)\?", lambda s, m: only(s, m[1]).mark),
    ("colour", r"What color is the (.+)\?", lambda s, m: only(s, m[1]).colour),
    ("shape", r"Which shape (?:is|has an?) (\w+)(?: dot)?\?", shape_with),
    ("detail", r"Which (\w+) digit is handwritten\?", lambda s, m: read(s, re.match("(.*) (.*)", f"{m[1]} digit"))),
    ("reading", r"Which (?:(\w+) )?(word|number) is there\?", read),
    ("position", r"Where is the (.+)\?", quarter),
    ("relation", r"Is the (.+) (left of|right of|above|below) the (.+)\?", related),
]


def test_answers_are_right(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        kind, match, reader = next((k, m, r) for k, p, r in READERS if (m := re.fullmatch(p, question.text)))
        assert kind == question.kind, question
        assert reader(scene, match) == question.answer, (question, scene)


@pytest.mark.verify  # of scenes that are pinned above
def test_who_does_not_see_the_picture_guesses_at_chance(record_property: pytest.Function) -> None:
    """The best guess for each form of question (its words, but for the names of colours and so on)."""
    asked = [question for seed in range(2000) for question in ask(make_scene("test", seed))]
    names = re.compile(rf"\b({'|'.join((*COLOURS, *SHAPES))}|handwritten \d|word|number)(s|es)?\b")
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in asked:
        answers[question.kind, names.sub("#", question.text).replace(" an ", " a ")][question.answer] += 1
    chance = {"count": 1 / 5, "colour": 1 / 8, "shape": 1 / 6, "position": 1 / 4, "reading": 0, "detail": 1 / 8}
    for kind in KINDS:
        forms = [counts for (its_kind, _), counts in answers.items() if its_kind == kind]
        total = sum(counts.total() for counts in forms)
        blind = sum(counts.most_common(1)[0][1] for counts in forms) / total
        print(f"{kind}: blind {blind:.1%}, chance {chance.get(kind, 0.5):.1%}, of {total}")
        assert blind < chance.get(kind, 0.5) + 0.05, f"{kind} can be guessed from the question"


def test_labels_are_where_the_things_are_painted() -> None:
    """A thing changes the pixels of the patches labelled with it, and hardly those of any other."""
    missed = changed_total = idle = labelled_total = 0
    for seed in range(40):
        scene = make_scene("train", seed)
        ground = np.asarray(paint(Scene(**{**vars(scene), "items": ()})), dtype=int)
        different = np.abs(np.asarray(paint(scene), dtype=int) - ground).sum(-1) > 60
        share = different.reshape(24, PATCH, 24, PATCH).mean((1, 3)).ravel()
        labelled = patch_labels(scene)[:, 0] > 0
        missed += int((~labelled & (share > 0.5)).sum())
        changed_total += int((share > 0.5).sum())
        idle += int((labelled & (share == 0)).sum())
        labelled_total += int(labelled.sum())
    assert missed < 0.03 * changed_total
    assert idle < 0.04 * labelled_total


def test_each_character_has_a_patch_of_its_own(scenes: dict[str, list[Scene]]) -> None:
    fields = list(FIELDS)
    for scene in scenes["train"][:100]:
        labels = patch_labels(scene)
        for item in scene.items:
            if item.kind not in ("word", "number"):
                continue
            spelled = []
            for index in range(len(item.text)):
                column = int(item.left + (index + 0.5) * item.pitch) // PATCH
                patch = labels[int(item.y) // PATCH * 24 + column]
                values = {field: FIELDS[field][patch[fields.index(field)]] for field in FIELDS}
                assert values["centre"] == "centre"
                assert values["colour"] == item.colour
                assert values["index"] == str(index + 1)
                assert (values["last"] == "last") == (index == len(item.text) - 1)
                spelled.append(values["character"])
            assert "".join(spelled) == item.text


def test_centres_count_the_shapes(scenes: dict[str, list[Scene]]) -> None:
    fields = list(FIELDS)
    for scene in scenes["train"][:100]:
        labels = patch_labels(scene)
        centres = labels[labels[:, fields.index("centre")] == 1]
        painted = Counter((item.colour, item.shape) for item in scene.of_kind("shape"))
        named = Counter(
            (FIELDS["colour"][row[1]], FIELDS["shape"][row[2]]) for row in centres if FIELDS["kind"][row[0]] == "shape"
        )
        assert named == painted


def test_codes_hold_labels_and_places() -> None:
    labels = patch_labels(make_scene("train", 3))
    code = codes(labels, 24)
    assert code.shape == (576, code_size())
    assert len(np.unique(code, axis=0)) == 576, "no two patches are alike, as each knows its place"
    start = 0
    for column, values in enumerate(FIELDS.values()):
        width = len(values) - ("none" in values)
        block = code[:, start : start + width]
        assert (block.sum(1) == ((labels[:, column] > 0) | ("none" not in values))).all()
        start += width


def test_smaller_canvases_are_the_same_world() -> None:
    for grid in (8, 12, 16):
        canvases = [make_scene("train", seed, grid=grid) for seed in range(100)]
        assert {question.kind for scene in canvases for question in ask(scene, 9)} == set(KINDS)
        assert all(item.left >= 0 and item.right <= grid * PATCH for scene in canvases for item in scene.items)

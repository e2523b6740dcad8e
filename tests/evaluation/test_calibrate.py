"""The search of a preset with an asker that answers as told, and samples that are none."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vllm_vtprune.budget import exact_spectrum
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import LLAVA, EnergyBudget, RatioBudget
from vllm_vtprune.presets import read_presets
from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import Arm
from vllm_vtprune_evaluation.calibrate import calibrate
from vllm_vtprune_evaluation.preset_search import NoPreset, Search
from vllm_vtprune_evaluation.questions import Picture, SampleError, read_sample
from vllm_vtprune_evaluation.scenes import Question
from vllm_vtprune_evaluation.search import (
    METHODS_TO_TRY,
    Candidate,
    Retained,
    Trial,
    candidates,
    halve,
    ladder,
    retained,
    sizes,
    survivors,
)
from vllm_vtprune_evaluation.spectra import Sample
from vllm_vtprune_evaluation.thresholds import Measured

WHOLE = 576
RANK = 192


def trial(tokens: float, share: float, kind: str = "ratio") -> Trial:
    return Trial({"type": kind}, tokens, Retained(share, (share, share), 100))


def answers(*texts: str, right: str = "") -> list[Answer]:
    return [Answer(f"p#{index}", "", "unknown", text, text == right, 64) for index, text in enumerate(texts)]


# --- halving ----------------------------------------------------------------------------------------------------------


def test_half_of_the_items_reach_the_next_rung_and_the_best_comes_first() -> None:
    asked: list[tuple[int, int]] = []

    def scores(items: Sequence[int], size: int) -> list[float]:
        asked.append((len(items), size))
        return [item / 100 for item in items]

    assert halve(range(11), sizes(200), scores) == [10, 9]
    assert asked == [(11, 25), (6, 50), (3, 100), (2, 200)]


def test_of_equals_the_first_wins_and_luck_on_few_pictures_does_not_last() -> None:
    assert halve(["a", "b", "c", "d"], [1, 2, 4], lambda items, _: [0.5] * len(items)) == ["a", "b"]

    def lucky_at_first(items: Sequence[str], size: int) -> list[float]:
        return [{"good": 0.9, "lucky": 1.0 if size == 1 else 0.2, "bad": 0.1}.get(item, 0.0) for item in items]

    assert halve(["bad", "lucky", "good", "worse"], [1, 2, 4], lucky_at_first)[0] == "good"


def test_rungs_of_small_samples() -> None:
    assert sizes(1) == [1]
    assert sizes(3) == [1, 2, 3]
    assert survivors(1, 4) == [1, 1, 1, 1]


def test_candidates_are_what_the_family_can_run_with_any_number_of_tokens() -> None:
    names = [candidate.name for candidate in candidates([*METHODS_TO_TRY, "maxpool3x3"], LLAVA)]
    assert names[:4] == ["resprune", "resprune, alpha 0", "resprune, alpha 1.0", "resprune, gate clip"]
    assert "leverage" in names
    assert "resize" not in names, "it needs dynamic resolution"
    assert "maxpool3x3" not in names, "it cannot keep every number of tokens"


# --- the budget -------------------------------------------------------------------------------------------------------


def test_the_smallest_budget_that_retains_enough_then_larger_ones() -> None:
    tried = [trial(288, 1.0), trial(144, 0.995), trial(72, 0.97), trial(36, 0.9)]
    assert ladder(tried, 0.99) == [tried[1], tried[0]]
    assert ladder(tried, 0.5) == tried[::-1]
    assert ladder(tried, 1.01) == []


def test_a_smaller_budget_that_was_lucky_is_not_taken() -> None:
    tried = [trial(288, 1.0), trial(144, 0.98), trial(72, 0.995)]
    assert ladder(tried, 0.99) == [tried[0]]


def test_of_two_kinds_the_fewer_tokens_then_what_retains_more_then_the_ratio() -> None:
    ratio, energy = trial(72, 0.97), trial(72.3, 0.98, "energy")
    assert ladder([ratio, energy], 0.9)[0] is energy
    assert ladder([trial(72, 0.97), trial(72, 0.97, "energy")], 0.9)[0].kind == "ratio"
    assert ladder([ratio, trial(60, 0.91, "energy")], 0.9)[0].mean_tokens == 60
    assert ladder([ratio, energy], None)[0] is energy


def test_right_answers_count_where_they_are_known_and_agreement_elsewhere() -> None:
    whole, pruned = answers("red", "red", "blue", right="red"), answers("red", "blue", "Blue.", right="red")
    assert retained(pruned, whole, known=True).share == pytest.approx(1 / 2)
    assert retained(pruned, whole, known=True).counted == 2
    assert retained(pruned, whole, known=False).share == pytest.approx(2 / 3)


def test_the_interval_is_that_of_pictures() -> None:
    """Two questions about one picture say less than questions about two."""

    def of(label: Callable[[int], str]) -> Retained:
        whole = [Answer(f"{label(index)}#{index}", "", "", "red", True, 576) for index in range(40)]
        pruned = [Answer(answer.question, "", "", "red", index % 4 < 2, 64) for index, answer in enumerate(whole)]
        return retained(pruned, whole, known=True)

    many, few = of(lambda index: f"p{index}"), of(lambda index: f"p{index // 2}")
    assert many.share == few.share == 0.5
    assert few.ci95[1] - few.ci95[0] > 1.2 * (many.ci95[1] - many.ci95[0])


# --- the whole search -------------------------------------------------------------------------------------------------


class ScriptedAsker:
    """Answers as told: a method's share of right answers at some tokens, spread evenly over questions."""

    def __init__(self, store: Answers, accuracy: Callable[[Arm, float, Picture], float]) -> None:
        self.store = store
        self.accuracy = accuracy
        self.asked: dict[str, int] = {}

    def __call__(self, pictures: Sequence[Picture], arms: Sequence[Arm], progress: Callable[[int], object]) -> None:
        for arm in arms:
            for picture in pictures:
                for index in range(len(picture.questions)):
                    if not self.store.has(arm, picture.name(index)):
                        self.store.add(arm, self.answer(arm, picture, index))
                    progress(1)

    def answer(self, arm: Arm, picture: Picture, index: int) -> Answer:
        self.asked[arm.name] = self.asked.get(arm.name, 0) + 1
        budget: Any = arm.policy["budget"] if isinstance(arm.policy, dict) else {"type": "ratio", "keep": 1}
        tokens = WHOLE * budget["keep"] if budget["type"] == "ratio" else 2 * budget["min_tokens"]
        number = int(picture.label) * len(picture.questions) + index
        right = number * 0.6180339887 % 1 < self.accuracy(arm, tokens, picture)  # spread evenly
        return Answer(picture.name(index), "", "", "yes" if right else "no", right, tokens)


def sample(pictures: int) -> list[Picture]:
    return [Picture(str(number), Path("none"), (Question("", "Is it?", "yes"),) * 5) for number in range(pictures)]


def searching(folder: Path, accuracy: Callable[[Arm, float, Picture], float]) -> tuple[Search, ScriptedAsker]:
    pictures = sample(60)
    torch.manual_seed(0)
    rows = torch.randn(WHOLE, RANK)
    measured = [Measured(exact_spectrum(rows), WHOLE, WHOLE, 5) for _ in pictures[:40]]
    encoded = Sample(VisualFeatures(embeds=rows, encoder=rows), measured, LLAVA)
    store = Answers(folder / "answers.jsonl", {})
    asker = ScriptedAsker(store, accuracy)
    return Search(asker, store, encoded, pictures[:40], pictures[40:], known=True), asker


def test_the_best_method_and_the_smallest_budget_are_found_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def accuracy(arm: Arm, tokens: float, _: Picture) -> float:
        lost = {"unpruned": 0.0, "good": 0.4}.get(arm.name, 1.5)
        return 0.9 * (1 - lost * 16 / tokens)

    search, asker = searching(tmp_path, accuracy)
    tried = [Candidate(name, {"method": "divprune"}) for name in ("bad", "poor", "good", "weak", "sad")]
    choice = search.run(tried, tokens=None, retain=0.9)
    assert choice.candidate.name == "good"
    assert choice.trial.mean_tokens == pytest.approx(72, abs=1), "54 tokens retain 88 %"
    assert choice.checked is not None
    assert choice.checked.share == pytest.approx(1 - 0.4 * 16 / 72, abs=0.03)
    assert asker.asked["bad"] < asker.asked["good"]
    out = capsys.readouterr().out
    assert "method  questions  retained at 144  retained at 36" in out
    assert out.split().count("chosen") == 1
    (tmp_path / "p.toml").write_text(choice.preset("mine", "a model"))
    policy = read_presets(tmp_path / "p.toml")["mine"]
    assert isinstance(policy.budget, RatioBudget)
    assert policy.budget.keep == 1 / 8


def test_energy_is_taken_where_it_retains_more_with_a_floor_and_a_ratio_where_it_cannot_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def accuracy(arm: Arm, tokens: float, _: Picture) -> float:
        energy = isinstance(arm.policy, dict) and arm.policy["budget"]["type"] == "energy"
        return 0.9 if energy or arm.name == "unpruned" else 0.8

    search, _ = searching(tmp_path, accuracy)
    only = [Candidate("divprune", {"method": "divprune"})]
    choice = search.run(only, tokens=100, retain=None)
    (tmp_path / "p.toml").write_text(choice.preset("mine", "a model"))
    budget = read_presets(tmp_path / "p.toml")["mine"].budget
    assert isinstance(budget, EnergyBudget)
    assert budget.min_tokens == 50

    choice = search.run(only, tokens=300, retain=None)
    assert choice.trial.kind == "ratio"
    stderr = " ".join(capsys.readouterr().err.split())
    assert (
        "An energy budget keeps at most 192.0 tokens on average here (the features' rank); for 300.0, take a ratio"
        in stderr
    )


def test_a_budget_that_does_not_hold_on_other_pictures_gives_way_to_a_larger_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def accuracy(arm: Arm, tokens: float, picture: Picture) -> float:
        return 0.4 if tokens < 200 and int(picture.label) >= 40 else 0.9

    search, _ = searching(tmp_path, accuracy)
    choice = search.run([Candidate("divprune", {"method": "divprune"})], tokens=None, retain=0.95)
    assert choice.trial.mean_tokens == pytest.approx(216)
    assert "retains 44." in capsys.readouterr().err


def test_nothing_that_retains_enough_is_an_error_with_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search, _ = searching(tmp_path, lambda arm, *_: 0.9 if arm.name == "unpruned" else 0.3)
    with pytest.raises(NoPreset, match=r"nothing that was tried retains 0.95 on the searched pictures"):
        search.run([Candidate("divprune", {"method": "divprune"})], tokens=None, retain=0.95)
    assert "ratio 0.5" in capsys.readouterr().out


def test_a_model_that_answers_nothing_right_has_nothing_to_retain(tmp_path: Path) -> None:
    search, asker = searching(tmp_path, lambda *_: 0.0)
    with pytest.raises(NoPreset, match="the unpruned model answers 0 of 200 questions right, so there is nothing to"):
        search.run(candidates(METHODS_TO_TRY, LLAVA), tokens=None, retain=0.95)
    assert list(asker.asked) == ["unpruned"], "nothing else was asked"


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_read_by_picture(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (20, 10), 128).save(tmp_path / "in" / "a.png")
    lines = [
        {"image": "in/a.png", "question": "What?"},
        {"image": "in/a.png", "question": "Why?", "answer": "because"},
    ]
    (tmp_path / "sample.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [picture] = read_sample(tmp_path / "sample.jsonl")
    assert [(question.text, question.answer) for question in picture.questions] == [("What?", ""), ("Why?", "because")]
    assert picture.name(1) == "in/a.png#1"
    assert (picture.paint().mode, picture.paint().size) == ("RGB", (20, 10))


def test_a_picture_is_seen_as_the_server_sees_it(tmp_path: Path) -> None:
    """Upright, and on white where it is transparent."""
    lying = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    lying.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "sample.jsonl").write_text('{"image": "a.png", "question": "What?"}')
    [picture] = read_sample(tmp_path / "sample.jsonl")
    assert picture.paint().size == (10, 20)
    assert picture.paint().getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no question"),
        ("{", ":1: is not JSON"),
        (
            '{"image": "a.png"}',
            ':1: {"image": "a.png"} is not accepted; expected an object with strings "image" and "question"',
        ),
        ('{"image": "a.png", "question": "What?", "label": "x"}', "is not accepted; expected an object"),
        ('{"image": "a.png", "question": 3}', "is not accepted; expected an object"),
        ('{"image": "a.png", "question": "What?"}', ":1: image: [Errno 2] No such file"),
        ('{"image": "sample.jsonl", "question": "What?"}', "bytes); expected a file that holds an image"),
    ],
)
def test_a_file_that_is_no_sample_says_where_and_why(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sample.jsonl"
    file.write_text(content)
    with pytest.raises(SampleError) as refused:
        read_sample(file)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "one of the arguments --retain --tokens is required"),
        ("--tokens 9 --methods magic", "argument --methods: 'magic' is not accepted"),
        ("--tokens 9 --url http://x --offline", "--offline: cannot be combined"),
        ("--retain 99", "argument --retain: '99' is not accepted; expected a number above 0 and at most 1"),
        ("--tokens 0", "argument --tokens: '0' is not accepted; expected a whole number from 1"),
        ("--tokens 9 --out missing/p.toml", "expected a file that does not exist yet, in a folder that does"),
        ("--tokens 9 --out p.json", "--out: p.json is not accepted; expected a name that ends in .toml"),
        ("--tokens 9 --name 9", "argument --name: '9' is not accepted; expected a letter"),
    ],
)
def test_options_that_are_none_are_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        calibrate(["--out", "p.toml", *options.split()])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err

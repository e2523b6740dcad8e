"""The choice of a preset, and samples that are none."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vllm_vtprune_evaluation.answers import Answer
from vllm_vtprune_evaluation.calibrate import Trial, calibrate, choose, retained
from vllm_vtprune_evaluation.questions import SampleError, read_sample


def trials(*shares: float) -> list[Trial]:
    return [Trial(0.99 - 0.01 * index, 288 / 2**index, share) for index, share in enumerate(shares)]


def answers(*texts: str, right: str = "") -> list[Answer]:
    return [Answer(f"p#{index}", "", "unknown", text, text == right, 64) for index, text in enumerate(texts)]


def test_the_smallest_budget_that_retains_enough() -> None:
    tried = trials(1.0, 0.995, 0.97, 0.9)
    assert choose(tried, 0.99) is tried[1]
    assert choose(tried, 0.95) is tried[2]
    assert choose(tried, 0.5) is tried[3]


def test_a_smaller_budget_that_was_lucky_is_not_taken() -> None:
    tried = trials(1.0, 0.98, 0.995)
    assert choose(tried, 0.99) is tried[0]


def test_nothing_is_chosen_where_nothing_retains_enough() -> None:
    assert choose(trials(0.98, 0.99), 0.99) is None


def test_where_only_the_number_of_tokens_counts_there_is_one() -> None:
    [only] = trials(0.0)
    assert choose([only], None) is only


def test_right_answers_count_where_they_are_known_and_agreement_elsewhere() -> None:
    whole, pruned = answers("red", "red", "blue", right="red"), answers("red", "blue", "Blue.", right="red")
    assert retained(pruned, whole, known=True) == pytest.approx(1 / 2)
    assert retained(pruned, whole, known=False) == pytest.approx(2 / 3)


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
        (
            '{"image": "sample.jsonl", "question": "What?"}',
            "bytes); expected a file that holds an image",
        ),
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
        (["--out", "p.toml"], "one of the arguments --tokens --retain is required"),
        (
            ["--retain", "99", "--out", "p.toml"],
            "argument --retain: '99' is not accepted; expected a number above 0 and at most 1",
        ),
        (
            ["--tokens", "0", "--out", "p.toml"],
            "argument --tokens: '0' is not accepted; expected a whole number from 1",
        ),
        (
            ["--tokens", "9", "--out", "no such/p.toml"],
            "expected a file that does not exist yet, in a folder that does",
        ),
        (["--tokens", "9", "--out", "p.json"], "--out: p.json is not accepted; expected a name that ends in .toml"),
        (
            ["--tokens", "9", "--out", "p.toml", "--name", "9"],
            "argument --name: '9' is not accepted; expected a letter",
        ),
    ],
)
def test_options_that_are_none_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        calibrate(options)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err

"""Training the demo model: its shortcuts compute what the server computes, and it can be stopped at any moment."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from training.batches import COUNTING, READING, Batches, random_positions, usual_positions
from training.gate import moved
from training.loop import run_stage
from training.model import LOOKING, Codebook, answer_logits, code_columns, encode
from training.optimizer import Muon, orthogonal
from training.schedule import stages
from training.stages import Phase, Stage, Trainee, answer_accuracy, loss_of, read_fields
from training.tokenizer import IMAGE_ID, VOCABULARY, scene_tokenizer
from vllm_vtprune_checkpoints.llava import save_llava_checkpoint
from vllm_vtprune_evaluation.scenes import FIELDS, ask, code_size, make_scene, paint

pytestmark = pytest.mark.verify

CPU = torch.device("cpu")
SHORT = Stage("language", (Phase(8, 20, 2), Phase(12, 20, 2)), 2e-3, parts=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return scene_tokenizer()


@pytest.fixture(scope="module")
def trainee(tokenizer: Any) -> Trainee:
    return Trainee(0, tokenizer)


@pytest.fixture(scope="module")
def train(tokenizer: Any) -> Batches:
    return Batches(tokenizer, "train")


def test_words_in_pictures_are_spelled_and_those_of_questions_are_not(tokenizer: Any) -> None:
    assert tokenizer.tokenize(" ZEBRA 407") == ["Ġ", *"ZEBRA", "Ġ", *"407"]
    for seed in range(40):
        for question in ask(make_scene("test", seed), 9):
            for word in question.text.removesuffix("?").split():
                if not word.isdigit():
                    assert len(tokenizer.tokenize(word if word[0].isupper() else f" {word}")) == 1, word
    assert tokenizer.tokenize("\nWhat is it? ASSISTANT:")[-1] == "ASSISTANT:"
    text = "Any text: Ünïcode, UPPER, 12 345!"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == VOCABULARY


def test_the_model_fits_into_the_package(trainee: Trainee) -> None:
    assert 2 * sum(weight.numel() for weight in trainee.model.parameters()) <= 20e6  # bytes in bfloat16


def test_questions_asked_together_are_answered_as_if_alone(trainee: Trainee, train: Batches) -> None:
    batch = train.make(0, 2, 5, pictures=True)
    with torch.inference_mode():
        visual, _ = encode(trainee.model, batch.pixels)
        usual = usual_positions(len(train.prefix), *visual.shape[:2])
        together, _ = answer_logits(trainee.model, train.prefix, visual, usual, batch.text)
        alone = []
        for row in range(2):
            for pair in range(5):
                mine = batch.text.pairs[row] == pair
                ids = torch.cat([train.prefix, torch.full((576,), IMAGE_ID), batch.text.ids[row][mine]])[None]
                logits = trainee.model(input_ids=ids, pixel_values=batch.pixels[row : row + 1]).logits[0]
                alone.append(logits[len(train.prefix) + 576 :][batch.text.wanted[row][mine]])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_attention_is_held_to_what_the_question_is_about(train: Batches, tokenizer: Any) -> None:
    batch = train.make(3, 4, 12, grid=12)
    looks = batch.looks
    assert looks is not None
    prompt = {
        (row, pair): int(mine.nonzero()[0])
        for row in range(4)
        for pair in range(12)
        for mine in [(batch.text.pairs[row] == pair) & batch.text.wanted[row]]
    }
    expected = set()
    for (row, pair), token in prompt.items():
        question, labels = batch.questions[row][pair], batch.labels[row]
        if question.kind == "reading":
            for letter, character in enumerate(question.answer):
                # at the token after which the letter comes
                at = token + 1 + letter
                assert tokenizer.decode([int(batch.text.ids[row][at + 1])]) == character
                expected.add((row, at, READING))
                [index] = ((looks.rows == row) & (looks.tokens == at)).nonzero().tolist()
                shown = labels[looks.targets[index[0]] > 0, list(FIELDS).index("character")]
                assert {FIELDS["character"][int(value)] for value in shown} == {character}
        elif question.kind == "count":
            expected.add((row, token, COUNTING))
            [index] = ((looks.rows == row) & (looks.tokens == token)).nonzero().tolist()
            assert float(8 * looks.targets[index[0]].sum()) == pytest.approx(int(question.answer))
        else:
            steps = len(tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"])
            expected |= {(row, token + step, head) for head in range(len(question.about)) for step in range(steps)}
    assert set(zip(looks.rows.tolist(), looks.tokens.tolist(), looks.heads.tolist(), strict=True)) == expected


def test_a_look_is_measured_by_the_attention_that_transformers_computes(trainee: Trainee, train: Batches) -> None:
    batch = train.make(0, 1, 1, pictures=True)
    assert batch.looks is not None
    looks = batch.looks
    with torch.inference_mode():
        visual, _ = encode(trainee.model, batch.pixels)
        usual = usual_positions(len(train.prefix), *visual.shape[:2])
        _, astray = answer_logits(trainee.model, train.prefix, visual, usual, batch.text, looks)
        trainee.model.set_attn_implementation("eager")
        ids = torch.cat([train.prefix, torch.full((576,), IMAGE_ID), batch.text.ids[0]])[None]
        output = trainee.model(input_ids=ids, pixel_values=batch.pixels, output_attentions=True)
        trainee.model.set_attn_implementation("sdpa")
    start = len(train.prefix)
    rows = output.attentions[LOOKING][0, looks.heads, start + 576 + looks.tokens]
    attention, at_start = rows[:, start : start + 576], rows[:, :start].sum(-1)
    any_of = -(attention * (looks.targets > 0)).sum(-1).log()
    each_of = -(attention.log() * looks.targets).sum(-1) - (1 - looks.targets.sum(-1)) * at_start.log()
    torch.testing.assert_close(astray, torch.where(looks.targets.amax(-1) == 1, any_of, each_of), rtol=1e-3, atol=1e-3)


def test_what_is_trained_on_is_what_a_client_sends(tokenizer: Any, tmp_path: Path, trainee: Trainee) -> None:
    """Same ids as the chat template's, same pixels as the image processor's."""
    processor = AutoProcessor.from_pretrained(save_llava_checkpoint(tmp_path, trainee.model, tokenizer))
    scene = make_scene("train", 4)
    batches = Batches(tokenizer, "train")
    batch = batches.make(4, 1, 3, pictures=True)
    question = batch.questions[0][0]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    sent = processor(images=paint(scene), text=prompt, return_tensors="pt")
    mine = batch.text.ids[0][batch.text.pairs[0] == 0]
    ids = torch.cat([batches.prefixes[1], torch.full((576,), IMAGE_ID), mine])
    length = sent["input_ids"].shape[1]
    assert sent["input_ids"][0].tolist() == ids[:length].tolist()
    answer = tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]
    assert ids[length:].tolist() == answer
    torch.testing.assert_close(sent["pixel_values"], batch.pixels, rtol=1e-3, atol=1e-3)


def test_the_exported_model_answers_alike_in_transformers(
    tokenizer: Any, tmp_path: Path, trainee: Trainee, train: Batches
) -> None:
    directory = save_llava_checkpoint(tmp_path, trainee.model, tokenizer, dtype="float32")
    loaded, report = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    pixels = train.make(1, 1, 1, pictures=True).pixels
    with torch.inference_mode():
        visual, _ = encode(trainee.model, pixels)
        torch.testing.assert_close(loaded.get_image_features(pixels).pooler_output[0], visual[0])


def test_codes_come_back_from_their_vectors() -> None:
    book = Codebook()
    codes = torch.rand(7, code_size())
    torch.testing.assert_close(book.read(book(codes)), codes)
    code = torch.zeros(code_size())
    code[code_columns()["colour=green"]] = 1
    values = {field: FIELDS[field][int(logits.argmax())] for field, logits in read_fields(code).items()}
    assert values["colour"] == "green"
    assert values["shape"] == values["mark"] == "none"


def test_nothing_is_left_out_in_training_and_positions_stay_in_order() -> None:
    positions = random_positions(3, 50, 64, torch.Generator().manual_seed(0))
    assert positions.shape == (50, 64)
    assert (positions.diff(dim=1) >= 0).all()
    assert (positions >= 3).all()
    spans = positions[:, -1] - positions[:, 0]
    assert spans.min() < 40
    assert spans.max() > 500
    assert (spans == 63).sum() > 8, "the served model's own positions should be among them"


def test_the_gate_numbers_tokens_as_if_some_were_gone() -> None:
    usual = usual_positions(3, 2, 576)
    assert torch.equal(moved(3, 2, 576, shift=0, stretch=1.0), usual)
    assert torch.equal(moved(3, 2, 576, shift=100, stretch=1.0), usual + 100)
    squeezed = moved(3, 2, 576, shift=0, stretch=0.2)
    assert squeezed[0, 0] == 3
    assert squeezed[0, -1] == pytest.approx(3 + 115)


def test_muon_s_step_is_nearly_orthogonal() -> None:
    for shape in ((64, 200), (200, 64)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.3
        assert values.max() < 1.4


@pytest.mark.parametrize("name", ["language", "tower", "joint"])
def test_a_few_steps_on_one_batch_lower_its_loss(tokenizer: Any, train: Batches, name: str) -> None:
    trainee = Trainee(1, tokenizer, layers=3)
    stage = Stage(name, (Phase(8 if name == "language" else 24, 100, 2),), 2e-3)
    optimizer = Muon(trainee.part(name), lr=2e-3)
    losses = []
    for _ in range(5):
        loss, _ = loss_of(stage, trainee, train, 0, CPU)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = {key for key, _ in trainee.part(name)}
    for key, weight in trainee.named_parameters():
        assert (weight.grad is not None) == (key in trained), key


def test_the_plan_follows_the_hours() -> None:
    short, long = stages(0.5), stages(3)
    for name in ("language", "tower", "joint"):
        assert long[name].steps == pytest.approx(6 * short[name].steps, rel=0.1)
    assert [phase.grid for phase in long["language"].phases] == sorted(phase.grid for phase in long["language"].phases)
    assert long["language"].phases[-1].grid == 24


def run(tokenizer: Any, directory: Path, deadline: float = float("inf")) -> bool:
    batches = {"train": Batches(tokenizer, "train"), "validation": Batches(tokenizer, "validation")}
    return run_stage(SHORT, Trainee(0, tokenizer, layers=3), batches, directory, CPU, deadline=deadline, held_out=8)


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (directory / "language.jsonl").open())]


KILLED = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
import training.loop
training.loop.SAVE_EVERY = 0.0
import test_training as tests
from pathlib import Path
tests.run(tests.scene_tokenizer(), Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_with_the_same_curve(tokenizer: Any, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tokenizer, tmp_path / "whole")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=Path(__file__).parents[2])
    log = tmp_path / "killed" / "language.jsonl"
    give_up = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run should not have ended by itself"
    assert (tmp_path / "killed" / "language.pt").exists()
    assert run(tokenizer, tmp_path / "killed")
    torch.set_num_threads(threads)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert run(tokenizer, tmp_path / "killed"), "a finished stage stays finished"


def test_a_deadline_saves_and_stops(tokenizer: Any, tmp_path: Path) -> None:
    assert not run(tokenizer, tmp_path, deadline=0.0)
    assert torch.load(tmp_path / "language.pt")["step"] == 10


def test_accuracy_counts_whole_answers(trainee: Trainee, tokenizer: Any) -> None:
    batches = Batches(tokenizer, "validation")
    scores = answer_accuracy(trainee, batches, 8, CPU, grid=8)
    assert set(scores) >= {"all", "existence"}
    assert all(0 <= score <= 0.7 for score in scores.values()), "an untrained model should know little"
    assert answer_accuracy(trainee, batches, 1, CPU, grid=8) == scores, "of one batch at least"

"""The demo model with a 2 x 2 merger: where it begins, what is trained, and what comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from training import merged
from training.batches import Batches
from training.merged import MergedTrainee, initialise, main, merged_stage
from training.model import Looks, encode
from training.optimizer import Muon
from training.stages import loss_of
from training.tokenizer import scene_tokenizer
from vllm_vtprune_checkpoints import TRAINED
from vllm_vtprune_evaluation.in_llm import InLLM
from vllm_vtprune_evaluation.merged import by_token, load_merged

pytestmark = pytest.mark.verify

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return scene_tokenizer(TRAINED)


@pytest.fixture(scope="module")
def train(tokenizer: Any) -> Batches:
    return Batches(tokenizer, "train")


def test_it_begins_as_the_mean_of_four_projected_patches(tokenizer: Any, train: Batches) -> None:
    trainee = MergedTrainee(0, tokenizer, TRAINED)
    settled, other = (train.make(number, 2, 1, pictures=True).pixels for number in (0, 5))
    assert settled is not None
    assert other is not None
    likeness = []
    for _ in range(2):
        with torch.inference_mode():
            expected = by_token(encode(trainee.model, other)[0]).mean(dim=2)
            likeness.append(float(cosine_similarity(trainee.see(other)[0], expected, dim=-1).mean()))
        initialise(trainee, settled)
    assert likeness[0] < 0.3
    assert likeness[1] > 0.9


def test_looks_are_at_the_tokens_that_hold_the_patches(tokenizer: Any) -> None:
    trainee = MergedTrainee(0, tokenizer, TRAINED)
    targets = torch.zeros(2, 576)
    targets[0, [0, 25, 3]] = 1.0  # the first two in one token
    targets[1, [0, 1, 575]] = 0.125
    ones = torch.ones(2, dtype=torch.long)
    shares = trainee.looks(Looks(ones, ones, ones, targets, ones.float())).targets
    assert shares.shape == (2, 144)
    assert {place: float(shares[0, place]) for place in shares[0].nonzero()[:, 0].tolist()} == {0: 1.0, 1: 1.0}
    assert {place: float(shares[1, place]) for place in shares[1].nonzero()[:, 0].tolist()} == {0: 0.25, 143: 0.125}


def test_a_few_steps_lower_the_loss_and_leave_the_encoder(
    tokenizer: Any, train: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "SCENES", 2)
    trainee = MergedTrainee(1, tokenizer, TRAINED)
    stage = merged_stage(1)
    optimizer = Muon(trainee.part("merged"), lr=2e-3)
    losses = []
    for _ in range(5):
        loss, _ = loss_of(stage, trainee, train, 0, CPU)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for key, weight in trainee.named_parameters():
        trained = key.startswith(("projector.", "model.model.language_model.", "model.lm_head."))
        assert (weight.grad is not None) == trained, key


@pytest.mark.parametrize("fresh", [False, True])
def test_the_command_trains_and_writes_what_the_evaluation_reads(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merged, "SCENES", 1)
    main(["--minutes", "50", "--stop-after", "0", "--out", str(tmp_path), *(["--fresh"] if fresh else [])])
    assert f"stopped; run the same command to continue: vtprune eval --merged {tmp_path}" in capsys.readouterr().out
    model = InLLM(TRAINED).model
    before = model.lm_head.weight.clone()
    merger = load_merged(tmp_path, model)
    state = torch.load(tmp_path / "merged.pt")
    assert state["step"] == 10
    for name, weights in merger.state_dict().items():
        assert torch.equal(weights, state["trainee"][f"projector.{name}"]), name
    assert torch.equal(model.lm_head.weight, state["trainee"]["model.lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, before)
    blocks = merger.linear_1.weight.unflatten(0, (4, -1)).unflatten(2, (4, -1)).square().mean(dim=(1, 3))
    assert (blocks.diagonal().mean() > 3 * blocks.mean()) != fresh, "four projectors side by side, or noise"

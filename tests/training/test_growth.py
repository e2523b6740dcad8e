"""Going on from an earlier model: nothing is lost when layers are added or the code of position becomes fainter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from training.batches import Batches, usual_positions
from training.growth import begin_with
from training.model import LAYERS, Codebook, answer_logits, encode
from training.stages import Trainee
from training.tokenizer import scene_tokenizer
from vllm_vtprune_checkpoints.llava import save_llava_checkpoint
from vllm_vtprune_evaluation.scenes import code_size
from vllm_vtprune_evaluation.scenes.labels import POSITION_SIZE

pytestmark = pytest.mark.verify

EARLIER_LAYERS = 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return scene_tokenizer()


@pytest.fixture(scope="module")
def earlier(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainee]:
    trainee = Trainee(3, tokenizer, EARLIER_LAYERS)
    directory = tmp_path_factory.mktemp("earlier")
    return save_llava_checkpoint(directory, trainee.model, tokenizer, dtype="float32"), trainee


def test_new_layers_add_nothing_at_first(tokenizer: Any, earlier: tuple[Path, Trainee]) -> None:
    checkpoint, before = earlier
    grown = Trainee(0, tokenizer)
    begin_with(grown.model, checkpoint)
    assert len(grown.model.model.language_model.layers) == LAYERS > EARLIER_LAYERS
    batches = Batches(scene_tokenizer(checkpoint), "train")
    batch = batches.make(0, 2, 3, grid=8)
    with torch.inference_mode():
        outs = []
        for trainee in (before, grown):
            visual = trainee.codebook(batch.codes)
            places = usual_positions(len(batches.prefix), *visual.shape[:2])
            outs.append(answer_logits(trainee.model, batches.prefix, visual, places, batch.text)[0])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


def test_a_fainter_code_of_position_changes_no_other_part_of_a_token(
    tokenizer: Any, earlier: tuple[Path, Trainee]
) -> None:
    checkpoint, before = earlier
    fainter = Trainee(0, tokenizer)
    begin_with(fainter.model, checkpoint, 0.5)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        old, new = (Codebook().read(encode(trainee.model, pixels)[0]) for trainee in (before, fainter))
    known = code_size() - POSITION_SIZE
    torch.testing.assert_close(new[..., :known], old[..., :known], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new[..., known:], 0.5 * old[..., known:], rtol=1e-4, atol=1e-4)

"""`python -m training.merged`: put a 2 x 2 merger into the demo model, and train it with the language model.

The vision encoder is frozen. The result is for `vtprune eval --merged`, which measures methods on a model whose visual
tokens are merged from four patches (`evaluation/merged.py`).

The merger is initialised as the mean of four projectors side by side; with `--fresh`, as noise. A step of 8 scenes took
2 seconds on one core of an AMD EPYC with AVX-512-BF16.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.batches import Batches
from training.growth import begin_with
from training.loop import run_stage
from training.model import GRID, WIDTH, Looks, patch_states
from training.stages import Phase, Stage, Trainee
from training.tokenizer import scene_tokenizer
from vllm_vtprune_checkpoints import embedded_checkpoint
from vllm_vtprune_evaluation.merged import PATCHES, Merger, by_token, save_merged

SCENES, SECONDS = 8, 2.0  # per step
RATE = 1.5e-3  # peak
INITIAL_SCENES = 4  # for `initialise`
HELD_OUT = 16  # scenes per intermediate test; a short run has as many tests as a long one


class MergedTrainee(Trainee):
    """The demo model with a merger, named `projector` so that Muon trains it."""

    def __init__(self, seed: int, tokenizer: Any, checkpoint: Path) -> None:
        super().__init__(seed, tokenizer)
        begin_with(self.model, checkpoint)
        self.projector = Merger(self.model.config.vision_config.hidden_size, WIDTH)

    def part(self, name: str) -> list[tuple[str, nn.Parameter]]:
        trained = ("projector.", "model.model.language_model.", "model.lm_head.")
        return [(key, parameter) for key, parameter in self.named_parameters() if key.startswith(trained)]

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            states = patch_states(self.model, pixels)
        return self.projector(states[:, 1:]), states[:, 0]

    def looks(self, looks: Looks) -> Looks:
        """Targets by token: 1 if any patch of the token is a target; shares are summed over the token's patches."""
        targets = by_token(looks.targets[..., None])[..., 0]
        any_of = looks.targets.amax(-1, keepdim=True) == 1
        return replace(looks, targets=torch.where(any_of, targets.amax(-1), targets.sum(-1)))


@torch.no_grad()
def initialise(trainee: MergedTrainee, pixels: Tensor) -> None:
    """Initialise the merger as the mean of the projector's outputs for a token's four patches.

    The projector has no norm, so fit the merger's norm to the identity: least squares, feature by feature.

    Args:
        trainee: changed in place.
        pixels: (B, 3, 336, 336) pictures to fit the norm on.
    """
    merger, projector = trainee.projector, trainee.model.model.multi_modal_projector
    states = patch_states(trainee.model, pixels)[:, 1:].flatten(0, 1)
    normed = nn.functional.layer_norm(states, states.shape[1:])
    slope = ((normed - normed.mean(0)) * states).mean(0) / normed.var(0, correction=0)
    merger.norm.weight.copy_(slope)
    merger.norm.bias.copy_(states.mean(0) - slope * normed.mean(0))
    merger.linear_1.weight.copy_(torch.kron(torch.eye(PATCHES), projector.linear_1.weight))
    merger.linear_1.bias.copy_(projector.linear_1.bias.repeat(PATCHES))
    merger.linear_2.weight.copy_(projector.linear_2.weight.repeat(1, PATCHES) / PATCHES)
    merger.linear_2.bias.copy_(projector.linear_2.bias)


def merged_stage(minutes: float) -> Stage:
    """The plan for a number of minutes on one core."""
    steps = max(10, round(60 * minutes / SECONDS / 10) * 10)
    return Stage("merged", (Phase(GRID, steps, SCENES),), RATE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.merged",
        description="Train the demo model with a 2 x 2 merger. Continues what is in --out.",
    )
    parser.add_argument("--minutes", type=float, default=50, help="length on one core (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="initialise the merger as noise, not from the projector")
    parser.add_argument("--out", type=Path, default=Path("build/merged"), help="folder (default: %(default)s)")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help="save and stop then")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.stop_after
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = embedded_checkpoint()
    tokenizer = scene_tokenizer(checkpoint)
    batches = {split: Batches(tokenizer, split) for split in ("train", "validation")}
    trainee = MergedTrainee(args.seed, tokenizer, checkpoint)
    if not args.fresh:
        pixels = batches["train"].make(0, INITIAL_SCENES, 1, pictures=True).pixels
        assert pixels is not None
        initialise(trainee, pixels)
    stage, device = merged_stage(args.minutes), torch.device("cpu")
    done = run_stage(stage, trainee, batches, args.out, device, deadline=deadline, held_out=HELD_OUT)
    file = save_merged(args.out, trainee.projector, trainee.model)
    print(f"{'finished' if done else 'stopped; run the same command to continue'}: vtprune eval --merged {file.parent}")


if __name__ == "__main__":
    main()

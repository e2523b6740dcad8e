"""Run a training stage that can be killed and resumed at any moment.

A step depends only on its number, the model and the optimizer, which are saved together. So an interrupted run equals
an uninterrupted one (on the same machine with as many threads).
"""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.batches import Batches
from training.optimizer import Muon, bfloat16_is_fast
from training.stages import Stage, Trainee, answer_accuracy, loss_of, patch_accuracy

LOG_EVERY = 10  # steps; a checkpoint is always at such a step
SAVE_EVERY = 120.0  # seconds
TESTS = 20  # in a stage
WARM_UP = 0.03
FINAL_RATE = 0.03
LONGEST_GRADIENT = 1.0


def run_stage(
    stage: Stage,
    trainee: Trainee,
    batches: dict[str, Batches],
    directory: Path,
    device: torch.device,
    *,
    deadline: float = math.inf,
    held_out: int = 48,
) -> bool:
    """Train to the stage's end or until `time.monotonic()` passes `deadline`.

    Args:
        stage: the stage.
        trainee: the model.
        batches: batches of "train" and "validation".
        directory: folder of `<stage>.pt` and `<stage>.jsonl`, which are continued.
        device: device to train on.
        deadline: on `time.monotonic()`.
        held_out: scenes per intermediate test.

    Returns:
        Whether the stage is finished.
    """
    state_file, log_file = directory / f"{stage.name}.pt", directory / f"{stage.name}.jsonl"
    named = trainee.part(stage.name)
    optimizer = Muon(named, lr=stage.rate)
    step = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device)
        if state["stage"] != asdict(stage):
            raise ValueError(f"{state_file} was begun with {state['stage']}, not with {asdict(stage)}")
        trainee.load_state_dict(state["trainee"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    _cut(log_file, step)
    test_every = max(LOG_EVERY, stage.steps // TESTS // LOG_EVERY * LOG_EVERY)
    saved, started, losses = time.monotonic(), time.monotonic(), []

    with log_file.open("a") as log, ThreadPoolExecutor(stage.parts) as workers:
        while step < stage.steps:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * rate_at(step / stage.steps)
            loss, notes = backward(stage, trainee, batches["train"], step, device, workers)
            torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], LONGEST_GRADIENT)
            optimizer.step()
            step += 1
            losses.append(loss)
            if step % LOG_EVERY and step < stage.steps:
                continue

            line: dict[str, Any] = {"step": step, "loss": sum(losses) / len(losses), **notes}
            line["seconds_per_step"] = (time.monotonic() - started) / len(losses)
            if step % test_every == 0 or step == stage.steps:
                line["held_out"] = held_out_accuracy(stage, trainee, batches["validation"], step, held_out, device)
            print(json.dumps(line), file=log, flush=True)
            print(_summary(stage, line), flush=True)
            started, losses = time.monotonic(), []
            late = time.monotonic() > deadline
            if late or step == stage.steps or time.monotonic() - saved > SAVE_EVERY:
                state = {
                    "stage": asdict(stage),
                    "trainee": trainee.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                }
                torch.save(state, state_file.with_suffix(".new"))
                os.replace(state_file.with_suffix(".new"), state_file)
                saved = time.monotonic()
            if late:
                break
    return step == stage.steps


def backward(
    stage: Stage, trainee: Trainee, batches: Batches, step: int, device: torch.device, workers: Executor
) -> tuple[float, dict[str, float]]:
    """Put the mean gradient of a step's parts into the parameters; return the mean loss and the first part's notes."""
    parameters = [parameter for _, parameter in trainee.part(stage.name)]

    def differentiate(part: int) -> tuple[float, dict[str, float], tuple[Tensor, ...]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast(device.type)):
            loss, notes = loss_of(stage, trainee, batches, step, device, part)
        return loss.item(), notes, torch.autograd.grad(loss, parameters)

    losses, notes, gradients = zip(*workers.map(differentiate, range(stage.parts)), strict=True)
    for parameter, *shares in zip(parameters, *gradients, strict=True):
        parameter.grad = torch.stack(shares).mean(0)
    return sum(losses) / stage.parts, notes[0]


def rate_at(progress: float) -> float:
    """Linear warm-up, then half a cosine."""
    fall = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (progress + 1e-4) / WARM_UP) * fall


def held_out_accuracy(
    stage: Stage, trainee: Trainee, batches: Batches, step: int, scenes: int, device: torch.device
) -> dict[str, float]:
    """Accuracy so far, by kind: of patches for the stage "tower", else of answers."""
    if stage.name == "tower":
        return patch_accuracy(trainee, batches, scenes // 2, device)
    grid, pictures = stage.phase(step - 1).grid, stage.name in ("joint", "merged")
    return answer_accuracy(trainee, batches, scenes, device, grid=grid, pictures=pictures)


def curve(directory: Path) -> Path:
    """Draw the losses and the held-out accuracies of all stages so far into `curve.png`."""
    from matplotlib.figure import Figure

    files = [file for name in ("language", "tower", "joint") if (file := directory / f"{name}.jsonl").exists()]
    columns = max(1, len(files))
    figure = Figure(figsize=(5 * columns, 7))
    axes = figure.subplots(2, columns, squeeze=False)
    for column, file in enumerate(files):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        losses, tests = axes[0][column], axes[1][column]
        losses.plot([line["step"] for line in lines], [line["loss"] for line in lines])
        losses.set(title=file.stem, yscale="log", ylabel="training loss")
        tested = [line for line in lines if "held_out" in line]
        for name in tested[-1]["held_out"] if tested else ():
            points = [(line["step"], line["held_out"][name]) for line in tested if name in line["held_out"]]
            tests.plot(*zip(*points, strict=True), label=name, linewidth=2.5 if name == "all" else 1)
        tests.set(ylim=(0, 1), ylabel="held-out accuracy", xlabel="step")
        if tested:
            tests.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(directory / "curve.png", dpi=110)
    return directory / "curve.png"


def _cut(log_file: Path, step: int) -> None:
    """Remove the lines logged after the checkpoint."""
    lines = log_file.read_text().splitlines() if log_file.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:  # cut off when the process was killed
            break
    log_file.write_text("".join(f"{line}\n" for line in kept))


def _summary(stage: Stage, line: dict[str, Any]) -> str:
    left = (stage.steps - line["step"]) * line["seconds_per_step"] / 60
    text = f"{stage.name} {line['step']}/{stage.steps}  loss {line['loss']:.3f}  about {left:.0f} minutes left"
    if "held_out" in line:
        text += "  " + "  ".join(f"{name} {value:.1%}" for name, value in line["held_out"].items())
    return text

"""`python -m training`: train the demo model, or continue training it."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from training.batches import Batches
from training.gate import ALLOWED, position_gate
from training.growth import begin_with
from training.loop import curve, run_stage
from training.schedule import stages
from training.stages import Stage, Trainee, answer_accuracy
from training.tokenizer import scene_tokenizer
from vllm_vtprune_checkpoints.llava import save_llava_checkpoint

EXAMPLE = """examples:
  python -m training                          # all stages, about three hours on two cores; run it again to continue
  python -m training --stop-after 40          # stop after 40 minutes
  python -m training --hours 0.2 --out /tmp/x # a short run, to see it work
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the demo model. Continues what is in --out.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="?", choices=["all", "language", "tower", "joint", "finish"], default="all")
    parser.add_argument("--out", type=Path, default=Path("build/training"), help="folder (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=3.0, help="length on two cores (default: %(default)s)")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help="save and stop then")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin-with", type=Path, metavar="DIR", help="an earlier checkpoint to start from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates (default: %(default)s)")
    parser.add_argument(
        "--fainter", type=float, default=1.0, help="factor of the earlier model's position code (default: 1)"
    )
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes at the end (default: %(default)s)")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.stop_after
    args.out.mkdir(parents=True, exist_ok=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True

    plan = stages(args.hours, args.rate)
    if args.stage == "all":
        together = [plan["language"], plan["tower"]]
        if args.device == "cpu" and torch.get_num_threads() > 1:
            done = _side_by_side(together, args)
        else:
            done = all(_run(stage, args, deadline) for stage in together)
        if done and _run(plan["joint"], args, deadline):
            _finish(args)
    elif args.stage == "finish":
        _finish(args)
    else:
        _run(plan[args.stage], args, deadline)


def _side_by_side(together: Sequence[Stage], args: argparse.Namespace) -> bool:
    """Run independent stages in parallel, one thread each, which is faster than two threads for one stage."""
    options = ["--out", str(args.out), "--hours", str(args.hours), "--seed", str(args.seed), "--device", "cpu"]
    options += ["--rate", str(args.rate)]
    if args.begin_with:
        options += ["--begin-with", str(args.begin_with), "--fainter", str(args.fainter)]
    options += ["--threads", str(max(1, torch.get_num_threads() // 2)), "--stop-after", str(args.stop_after)]
    running = [subprocess.Popen([sys.executable, "-m", "training", stage.name, *options]) for stage in together]
    try:
        failed = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    if any(failed):
        sys.exit("a stage failed; see above")
    return all(_finished(args.out, stage) for stage in together)


def _finished(directory: Path, stage: Stage) -> bool:
    file = directory / f"{stage.name}.pt"
    return file.exists() and torch.load(file, map_location="cpu")["step"] == stage.steps


def _run(stage: Stage, args: argparse.Namespace, deadline: float) -> bool:
    device = torch.device(args.device)
    tokenizer = scene_tokenizer(args.begin_with)
    trainee = Trainee(args.seed, tokenizer).to(device)
    if args.begin_with:
        begin_with(trainee.model, args.begin_with, args.fainter)
    if stage.name == "joint":
        for part in ("language", "tower"):
            trained = torch.load(args.out / f"{part}.pt", map_location=device)["trainee"]
            names = {name for name, _ in trainee.part(part)}
            trainee.load_state_dict({name: trained[name] for name in names}, strict=False)
    batches = {split: Batches(tokenizer, split) for split in ("train", "validation")}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // stage.parts))  # as many as there are cores, over all parts
    done = run_stage(stage, trainee, batches, args.out, device, deadline=deadline)
    torch.set_num_threads(threads)
    print(f"{stage.name}: {'finished' if done else 'stopped; run the same command to continue'}. See {curve(args.out)}")
    return done


def _finish(args: argparse.Namespace) -> None:
    """Evaluate the model on the test scenes, and save it as a checkpoint for vLLM."""
    device = torch.device(args.device)
    tokenizer = scene_tokenizer(args.begin_with)
    trainee = Trainee(args.seed, tokenizer).to(device)
    trainee.load_state_dict(torch.load(args.out / "joint.pt", map_location=device)["trainee"])
    save_llava_checkpoint(args.out / "checkpoint", trainee.model, tokenizer)
    batches = Batches(tokenizer, "test")
    scores = answer_accuracy(trainee, batches, args.scenes, device, pictures=True)
    gate = position_gate(trainee, batches, args.scenes // 4, device)
    result = {"test": scores, "positions": gate, "passes": gate["worst"] <= ALLOWED}
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

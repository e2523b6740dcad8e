"""What each stage learns, and from what.

`language`: the language model, on codes instead of pictures. `tower`: vision encoder and projector, to emit those codes
for each patch. `joint`: everything, on pictures. `merged`: `training/merged.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from training.batches import Batch, Batches, random_positions, usual_positions
from training.model import GRID, LAYERS, Codebook, Looks, answer_logits, encode, new_model
from vllm_vtprune_evaluation.scenes import FIELDS, code_size

SHARPNESS = 12.0  # of the softmax that reads a value from a code
LOOK_WEIGHT = 0.3
FIELD_WEIGHTS = {"character": 2.0}  # of which there are most to tell apart
EMPTY_WEIGHT = 0.1  # of a patch that shows nothing: most do
KNOWN = sum(len(values) - ("none" in values) for values in FIELDS.values())  # columns before the position


class Trainee(nn.Module):
    """The model, with what only training needs: the codebook, and a head by which CLS names what is in the picture.

    CLIP's CLS token is trained to say what a picture shows. Without that its attention, by which some pruning methods
    choose, would be left to chance.
    """

    def __init__(self, seed: int, tokenizer: Any, layers: int = LAYERS) -> None:
        super().__init__()
        self.model: LlavaForConditionalGeneration = new_model(seed, tokenizer, layers)
        self.codebook = Codebook()
        self.summary = nn.Linear(self.model.config.vision_config.hidden_size, KNOWN)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the language model sees of pictures, and the state of CLS, as `encode`."""
        return encode(self.model, pixels)

    def looks(self, looks: Looks) -> Looks:
        """Where the attention ought to be, of looks at patches."""
        return looks

    def part(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters that a stage trains."""
        tower = ("model.model.vision_tower.", "model.model.multi_modal_projector.", "summary.")
        language = ("model.model.language_model.", "model.lm_head.")
        prefixes = {"language": language, "tower": tower, "joint": tower + language}[name]
        unused = ("vision_tower.encoder.layers.6.", "vision_tower.post_layernorm.")
        return [
            (key, parameter)
            for key, parameter in self.named_parameters()
            if key.startswith(prefixes) and not any(part in key for part in unused)
        ]


@dataclass(frozen=True)
class Phase:
    """Part of a stage. `size`: scenes in a step."""

    grid: int
    steps: int
    size: int


@dataclass(frozen=True)
class Stage:
    """`parts`: into how many batches a step's scenes are divided, each of which a thread of its own may take."""

    name: str
    phases: tuple[Phase, ...]
    rate: float  # peak learning rate
    parts: int = 1

    @property
    def steps(self) -> int:
        """Of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> Phase:
        """The phase that a step, counted over all phases, belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


QUESTIONS = 24  # behind each picture

Loss = tuple[Tensor, dict[str, float]]


def loss_of(stage: Stage, trainee: Trainee, batches: Batches, step: int, device: torch.device, part: int = 0) -> Loss:
    """The loss at a step, or in a part of it, and what else is worth a line in the log."""
    phase = stage.phase(step)
    size, number = phase.size // stage.parts, step * stage.parts + part
    generator = torch.Generator().manual_seed(number)
    if stage.name == "language":
        batch = batches.make(number, size, QUESTIONS, grid=phase.grid)
        visual = trainee.codebook(blurred(batch.codes, generator).to(device))
        return answer_loss(trainee, batches, batch, visual, generator)
    assert phase.grid == GRID, "a tower sees pictures of one size"
    crowded = stage.name == "tower"
    batch = batches.make(number, size, 1 if crowded else QUESTIONS, pictures=True, crowded=crowded)
    assert batch.pixels is not None
    visual, cls = trainee.see(batch.pixels.to(device))
    if stage.name == "merged":
        return answer_loss(trainee, batches, batch, visual, generator)
    dense = dense_loss(trainee, batch, visual, cls)
    if crowded:
        return dense, {}
    loss, notes = answer_loss(trainee, batches, batch, visual, generator)
    return loss + 0.2 * dense, {**notes, "dense": dense.item()}


def blurred(codes: Tensor, generator: torch.Generator) -> Tensor:
    """Codes as a tower might emit them: none quite certain."""
    certainty = 0.6 + 0.5 * torch.rand(codes.shape[:2], generator=generator)[..., None]
    known = codes[..., :KNOWN] * certainty
    noise = torch.randn(codes.shape, generator=generator)
    noise[..., :KNOWN] *= 0.08
    noise[..., KNOWN:] *= 0.02  # a tower's patches have an embedding of their place
    return torch.cat([known, codes[..., KNOWN:]], dim=-1) + noise


def answer_loss(trainee: Trainee, batches: Batches, batch: Batch, visual: Tensor, generator: torch.Generator) -> Loss:
    """Cross entropy of the answers' tokens, given the visual tokens (B, N, d) at random positions; and of the looks."""
    size, tokens = visual.shape[:2]
    prefix = batches.prefixes[int(torch.randint(2, (), generator=generator))].to(visual.device)
    positions = random_positions(len(prefix), size, tokens, generator).to(visual.device)
    text = batch.text.to(visual.device)
    assert batch.looks is not None
    looks = trainee.looks(batch.looks).to(visual.device)
    logits, astray = answer_logits(trainee.model, prefix, visual, positions, text, looks)
    assert astray is not None
    answer = functional.cross_entropy(logits.float(), text.targets)
    look = (astray * looks.weights).sum() / looks.weights.sum()
    return answer + LOOK_WEIGHT * look, {"answer": answer.item(), "look": look.item()}


def read_fields(code: Tensor) -> dict[str, Tensor]:
    """(..., code_size()) -> for each field logits of its values, (..., values)."""
    logits = {}
    start = 0
    for field, values in FIELDS.items():
        width = len(values) - ("none" in values)
        block = code[..., start : start + width]
        if "none" in values:
            block = functional.pad(block, (1, 0), value=0.5)  # halfway between a value's absence and its presence
        logits[field] = SHARPNESS * block
        start += width
    return logits


def dense_loss(trainee: Trainee, batch: Batch, visual: Tensor, cls: Tensor) -> Tensor:
    """How far each patch is from its code, and CLS from a list of all that is there."""
    labels, codes = batch.labels.to(visual.device), batch.codes.to(visual.device)
    weight = torch.where(labels[..., 0] > 0, 1.0, EMPTY_WEIGHT)
    weight = weight / weight.sum()
    emitted = trainee.codebook.read(visual)
    loss = code_size() * ((emitted - codes).square().mean(-1) * weight).sum()
    rest = visual - trainee.codebook(emitted)  # what no code stands for
    loss = loss + (rest.square().sum(-1) * weight).sum()
    for column, (field, logits) in enumerate(read_fields(emitted).items()):
        wrong = functional.cross_entropy(logits.transpose(1, 2), labels[..., column], reduction="none")
        loss = loss + FIELD_WEIGHTS.get(field, 1.0) * (wrong * weight).sum()
    there = codes[..., :KNOWN].amax(1)
    return loss + 0.5 * functional.binary_cross_entropy_with_logits(trainee.summary(cls), there)


@torch.no_grad()
def patch_accuracy(trainee: Trainee, batches: Batches, scenes: int, device: torch.device) -> dict[str, float]:
    """Of patches that show something, how many values of each field are right; and how many patches altogether."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for number in range(scenes // 8):
        batch = batches.make(number, 8, 1, pictures=True)
        assert batch.pixels is not None
        visual, _ = encode(trainee.model, batch.pixels.to(device))
        labels = batch.labels.to(device)
        full = labels[..., 0] > 0
        every = torch.ones_like(full)
        for column, (field, logits) in enumerate(read_fields(trainee.codebook.read(visual)).items()):
            same = logits.argmax(-1) == labels[..., column]
            every &= same
            asked = (labels[..., column] > 0) & full
            right[field] += int(same[asked].sum())
            total[field] += int(asked.sum())
        right["full patch"] += int(every[full].sum())
        total["full patch"] += int(full.sum())
        right["empty patch"] += int(every[~full].sum())
        total["empty patch"] += int((~full).sum())
    return {field: right[field] / max(1, total[field]) for field in total}


Positions = Callable[[int, int, int], Tensor]


@torch.no_grad()
def answer_accuracy(
    trainee: Trainee,
    batches: Batches,
    scenes: int,
    device: torch.device,
    *,
    grid: int = GRID,
    pictures: bool = False,
    positions: Positions = usual_positions,
    questions: int = 9,
) -> dict[str, float]:
    """How many answers are right to the last token, by kind of question and overall ("all").

    An answer whose every token is the likeliest after the right ones before it is the one that greedy decoding gives.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for number in range(scenes // 8):
        batch = batches.make(number, 8, questions, grid=grid, pictures=pictures, repeat=False)
        if batch.pixels is None:
            visual = trainee.codebook(batch.codes.to(device))
        else:
            visual, _ = trainee.see(batch.pixels.to(device))
        place = positions(len(batches.prefix), *visual.shape[:2]).to(device)
        text = batch.text.to(device)
        logits, _ = answer_logits(trainee.model, batches.prefix.to(device), visual, place, text)
        wrong = torch.zeros(len(batch.scenes), questions, dtype=torch.int64, device=device)
        rows = torch.arange(len(batch.scenes), device=device)[:, None].expand_as(text.pairs)
        wrong.index_put_(
            (rows[text.wanted], text.pairs[text.wanted]), (logits.argmax(-1) != text.targets).long(), accumulate=True
        )
        for row, asked in enumerate(batch.questions):
            for pair, question in enumerate(asked):
                for name in (question.kind, "all"):
                    right[name] += int(wrong[row, pair] == 0)
                    total[name] += 1
    return {name: right[name] / total[name] for name in sorted(total)}

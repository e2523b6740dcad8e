"""The stages of training: what each learns, and from what.

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
from vllm_vtprune_evaluation.scenes.labels import POSITION_SIZE

SHARPNESS = 12.0  # inverse temperature of the softmax that reads a value from a code
LOOK_WEIGHT = 0.3
FIELD_WEIGHTS = {"character": 2.0}  # the field with most values
EMPTY_WEIGHT = 0.1  # of an empty patch: most are
KNOWN = code_size() - POSITION_SIZE  # columns before the position


class Trainee(nn.Module):
    """The model and what only training needs: the codebook, and a head with which CLS lists what is in the picture.

    CLIP's CLS token is trained to describe the picture. Without such a loss, CLS attention, which some pruning methods
    use, would be random.
    """

    def __init__(self, seed: int, tokenizer: Any, layers: int = LAYERS) -> None:
        super().__init__()
        self.model: LlavaForConditionalGeneration = new_model(seed, tokenizer, layers)
        self.codebook = Codebook()
        self.summary = nn.Linear(self.model.config.vision_config.hidden_size, KNOWN)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Visual tokens of pictures and the state of CLS, as `encode`."""
        return encode(self.model, pixels)

    def looks(self, looks: Looks) -> Looks:
        """Attention targets by visual token, from targets by patch."""
        return looks

    def part(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters that a stage trains."""
        encoder = ("model.model.vision_tower.", "model.model.multi_modal_projector.", "summary.")
        language = ("model.model.language_model.", "model.lm_head.")
        prefixes = {"language": language, "tower": encoder, "joint": encoder + language}[name]
        unused = ("vision_tower.encoder.layers.6.", "vision_tower.post_layernorm.")
        return [
            (key, parameter)
            for key, parameter in self.named_parameters()
            if key.startswith(prefixes) and not any(part in key for part in unused)
        ]


@dataclass(frozen=True)
class Phase:
    """Part of a stage. `size`: scenes per step."""

    grid: int
    steps: int
    size: int


@dataclass(frozen=True)
class Stage:
    """A stage. `parts`: batches that a step is split into, one per thread."""

    name: str
    phases: tuple[Phase, ...]
    rate: float  # peak learning rate
    parts: int = 1

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> Phase:
        """The phase of a step; steps are counted over all phases."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


QUESTIONS = 24  # per picture
TESTED, TESTED_QUESTIONS = 8, 9  # scenes of a batch of a test; per picture, at most

Loss = tuple[Tensor, dict[str, float]]


def loss_of(stage: Stage, trainee: Trainee, batches: Batches, step: int, device: torch.device, part: int = 0) -> Loss:
    """The loss of a step, or of a part of it, and other values for the log."""
    phase = stage.phase(step)
    size, number = phase.size // stage.parts, step * stage.parts + part
    generator = torch.Generator().manual_seed(number)
    if stage.name == "language":
        batch = batches.make(number, size, QUESTIONS, grid=phase.grid)
        visual = trainee.codebook(blurred(batch.codes, generator).to(device))
        return answer_loss(trainee, batches, batch, visual, generator)
    assert phase.grid == GRID, "the vision encoder reads pictures of one size"
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
    """Codes as a vision encoder might emit them: uncertain and noisy."""
    certainty = 0.6 + 0.5 * torch.rand(codes.shape[:2], generator=generator)[..., None]
    known = codes[..., :KNOWN] * certainty
    noise = torch.randn(codes.shape, generator=generator)
    noise[..., :KNOWN] *= 0.08
    noise[..., KNOWN:] *= 0.02  # less: a vision encoder has position embeddings
    return torch.cat([known, codes[..., KNOWN:]], dim=-1) + noise


def answer_loss(trainee: Trainee, batches: Batches, batch: Batch, visual: Tensor, generator: torch.Generator) -> Loss:
    """Cross entropy of the answers, with the visual tokens (B, N, d) at random positions, plus the attention loss."""
    size, tokens = visual.shape[:2]
    prefix = batches.prefixes[int(torch.randint(2, (), generator=generator))].to(visual.device)
    positions = random_positions(len(prefix), size, tokens, generator).to(visual.device)
    text = batch.text.to(visual.device)
    assert batch.looks is not None
    looks = trainee.looks(batch.looks).to(visual.device)
    logits, look_losses = answer_logits(trainee.model, prefix, visual, positions, text, looks)
    assert look_losses is not None
    answer = functional.cross_entropy(logits.float(), text.targets)
    look = (look_losses * looks.weights).sum() / looks.weights.sum()
    return answer + LOOK_WEIGHT * look, {"answer": answer.item(), "look": look.item()}


def read_fields(code: Tensor) -> dict[str, Tensor]:
    """(..., code_size()) -> logits of the values of each field, (..., values)."""
    logits = {}
    start = 0
    for field, values in FIELDS.items():
        width = len(values) - ("none" in values)
        block = code[..., start : start + width]
        if "none" in values:
            block = functional.pad(block, (1, 0), value=0.5)  # halfway between absence (0) and presence (1) of a value
        logits[field] = SHARPNESS * block
        start += width
    return logits


def dense_loss(trainee: Trainee, batch: Batch, visual: Tensor, cls: Tensor) -> Tensor:
    """Loss of each patch against its code, and of CLS against the list of everything in the picture."""
    labels, codes = batch.labels.to(visual.device), batch.codes.to(visual.device)
    weight = torch.where(labels[..., 0] > 0, 1.0, EMPTY_WEIGHT)
    weight = weight / weight.sum()
    emitted = trainee.codebook.read(visual)
    loss = code_size() * ((emitted - codes).square().mean(-1) * weight).sum()
    rest = visual - trainee.codebook(emitted)  # the part outside the codebook
    loss = loss + (rest.square().sum(-1) * weight).sum()
    for column, (field, logits) in enumerate(read_fields(emitted).items()):
        wrong = functional.cross_entropy(logits.transpose(1, 2), labels[..., column], reduction="none")
        loss = loss + FIELD_WEIGHTS.get(field, 1.0) * (wrong * weight).sum()
    there = codes[..., :KNOWN].amax(1)
    return loss + 0.5 * functional.binary_cross_entropy_with_logits(trainee.summary(cls), there)


@torch.no_grad()
def patch_accuracy(trainee: Trainee, batches: Batches, scenes: int, device: torch.device) -> dict[str, float]:
    """Accuracy of each field, on patches that show something; and of whole patches, full and empty."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for number in range(max(1, scenes // TESTED)):
        batch = batches.make(number, TESTED, 1, pictures=True)
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
) -> dict[str, float]:
    """Share of answers that are right to the last token, by kind of question and overall ("all").

    If every token of an answer is the likeliest after the right tokens before it, greedy decoding gives that answer.
    One batch of `TESTED` scenes is asked at least.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for number in range(max(1, scenes // TESTED)):
        batch = batches.make(number, TESTED, TESTED_QUESTIONS, grid=grid, pictures=pictures, repeat=False)
        if batch.pixels is None:
            visual = trainee.codebook(batch.codes.to(device))
        else:
            visual, _ = trainee.see(batch.pixels.to(device))
        place = positions(len(batches.prefix), *visual.shape[:2]).to(device)
        text = batch.text.to(device)
        logits, _ = answer_logits(trainee.model, batches.prefix.to(device), visual, place, text)
        wrong = torch.zeros(len(batch.scenes), TESTED_QUESTIONS, dtype=torch.int64, device=device)
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

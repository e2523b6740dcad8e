"""Answers of the methods that prune inside the language model, from plain transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_vtprune.plugin.inspection import InspectionFailed
from vllm_vtprune.policy import EnergyBudget, RatioBudget, TokensBudget
from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import Arm, energy
from vllm_vtprune_evaluation.asking import ANSWER_TOKENS
from vllm_vtprune_evaluation.in_llm import VTW, AdaptPrune, Budget, FastV, InLLM, Pruning, PyramidDrop
from vllm_vtprune_evaluation.in_llm.pyramiddrop import least_mean, quarters
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import Picture, is_right

Pairs = Sequence[tuple[Arm, Pruning | None]]


def reference_arms(
    keeps: Sequence[int], thresholds: Mapping[int, float], tokens: int, layers: int
) -> list[tuple[Arm, Pruning | None]]:
    """The arms: every method inside the language model, with fixed budgets and, where ``thresholds`` has one, "+E".

    FastV and AdaptPrune keep the budget from their layer on. PyramidDrop and VTW run with the fractions of their
    papers, and with every budget that their mean over the layers can reach. The first arm is the unpruned model; its
    answers should equal the engine's.

    Args:
        keeps: budgets, in tokens.
        thresholds: energy thresholds, by mean kept tokens.
        tokens: visual tokens per picture.
        layers: number of layers of the language model.
    """
    pairs: list[tuple[Arm, Pruning | None]] = [
        _pair("transformers", None),
        _pair("pyramiddrop", PyramidDrop()),
        _pair("vtw", VTW(RatioBudget(keep=0.5))),
    ]
    for keep in keeps:
        budgets: list[tuple[Budget, bool]] = [(TokensBudget(keep=keep), False)]
        if keep in thresholds:
            budgets.append((EnergyBudget(**energy(thresholds[keep])), True))
        for budget, adaptive in budgets:
            pairs.append(_pair("fastv", FastV(budget), keep, adaptive))
            pairs.append(_pair("adaptprune in the LLM", AdaptPrune(budget), keep, adaptive))
            if keep >= least_mean(tokens, layers):
                pairs.append(_pair("pyramiddrop", PyramidDrop(budget), keep, adaptive))
                pairs.append(_pair("vtw", VTW(budget), keep, adaptive))
    return pairs


def _pair(
    method: str, pruning: Pruning | None, keep: int | None = None, adaptive: bool = False
) -> tuple[Arm, Pruning | None]:
    name = method if keep is None else f"{method}{'+E' if adaptive else ''}@{keep}"
    return Arm(name, {"in_llm": repr(pruning)}, method, keep, adaptive, inside=True), pruning


def reference_model(checkpoint: str) -> InLLM:
    """Load the model in plain transformers; prompts start like those of vLLM's chat endpoint.

    Raises:
        InspectionFailed: the model is no LLaVA-1.5, or has too few layers for PyramidDrop.
    """
    try:
        model = InLLM(Path(checkpoint), add_special_tokens=False)
        quarters(layers_of(model))
    except (OSError, ValueError) as error:
        raise InspectionFailed(f"--in-llm: {checkpoint}: {error}") from error
    return model


def layers_of(model: InLLM) -> int:
    """The number of layers of the language model."""
    return int(model.model.config.text_config.num_hidden_layers)


def answer_all(model: InLLM, pictures: Sequence[Picture], pairs: Pairs, answers: Answers) -> None:
    """Ask every question in every arm, except those in ``answers``, which gets them."""
    total = len(pairs) * sum(len(picture.questions) for picture in pictures)
    with Progress(desc="answered", total=total, unit="questions") as progress:
        for picture in pictures:
            image = picture.paint()
            for arm, pruning in pairs:
                for index, question in enumerate(picture.questions):
                    name = picture.name(index)
                    if not answers.has(arm, name):
                        reply = model.answer(image, question.text, pruning, ANSWER_TOKENS)
                        right = is_right(reply.text, question.answer)
                        answers.add(arm, Answer(name, question.kind, picture.density, reply.text, right, reply.tokens))
                    progress.update()

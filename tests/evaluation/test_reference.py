"""The methods inside the language model, as rows of the same table."""

from pathlib import Path

from vllm_vtprune_checkpoints import TRAINED
from vllm_vtprune_evaluation.answers import Answers
from vllm_vtprune_evaluation.questions import pictures
from vllm_vtprune_evaluation.reference import answer_all, layers_of, reference_arms, reference_model


def test_every_method_in_the_language_model_is_a_row(tmp_path: Path) -> None:
    model = reference_model(str(TRAINED))
    asked = list(pictures("test", 2))
    pairs = reference_arms([64, 200], {64: 0.9, 200: 0.99}, tokens=576, layers=layers_of(model))
    with Answers(tmp_path / "answers.jsonl", {"model": "m"}) as answers:
        answer_all(model, asked, pairs, answers)
        answer_all(model, asked, pairs, answers)  # which finds all of them answered
        tokens = {arm.name: {answer.tokens for answer in answers.of(arm).values()} for arm, _ in pairs}
    adaptive = [tokens.pop(name) for name in ("fastv+E@64", "adaptprune in the LLM+E@64")]
    means = [tokens.pop(f"{method}@200") for method in ("fastv", "adaptprune in the LLM", "pyramiddrop")]
    plus_e = [tokens.pop(f"{method}+E@200") for method in ("fastv", "adaptprune in the LLM", "pyramiddrop")]
    assert means[:2] == [{(2 * 576 + 4 * 200) / 6}] * 2
    assert means[2] == {200}
    assert plus_e[0] == plus_e[1]
    assert not plus_e[2] & plus_e[0]
    assert tokens.pop("vtw@200") == {192}, "the nearest mean of whole layers"
    assert tokens.pop("vtw+E@200") <= {96, 192, 288}
    assert tokens == {
        "transformers": {576},
        "pyramiddrop": {576 * (2 + 1 / 2 + 2 / 4 + 1 / 8) / 6},
        "vtw": {576 / 2},
        "fastv@64": {(2 * 576 + 4 * 64) / 6},
        "adaptprune in the LLM@64": {(2 * 576 + 4 * 64) / 6},
    }
    assert adaptive[0] == adaptive[1], "the picture decides, not the method"
    assert adaptive[0] != {(2 * 576 + 4 * 64) / 6}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + 2 * len(pairs)


def test_a_budget_without_a_threshold_has_no_adaptive_row() -> None:
    assert not any(arm.adaptive for arm, _ in reference_arms([64, 128], {32: 0.9}, tokens=576, layers=4))

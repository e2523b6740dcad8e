"""The demo model with a 2 x 2 merger: what its tokens are, and that it is asked as plain transformers would."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.forked import context
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plan import plan_tokens
from vllm_vtprune.plugin.inspection import features_of, pruning_processor
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_checkpoints import TRAINED
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm, fixed
from vllm_vtprune_evaluation.asking import ANSWER_TOKENS
from vllm_vtprune_evaluation.command import evaluate
from vllm_vtprune_evaluation.in_llm import InLLM
from vllm_vtprune_evaluation.merged import FILE, Merger, by_token, load_merged, merged_features, save_merged
from vllm_vtprune_evaluation.offline import Offline
from vllm_vtprune_evaluation.options import weights_digest
from vllm_vtprune_evaluation.questions import pictures

BLIND = {"method": "resprune", "budget": fixed(20), "features": "both", "alpha": 0}
ARMS = [
    UNPRUNED,
    Arm("blind", BLIND, "resprune", 20),
    Arm("looking", {**BLIND, "alpha": 4, "seed_token": "relevance", "text": {"query": "red"}}, "resprune", 20),
    Arm("divprune", {"method": "divprune", "budget": fixed(20), "features": "encoder"}, "divprune", 20),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merger of noise, and a language model whose words all moved."""
    torch.manual_seed(0)
    model = InLLM(TRAINED).model
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings += 0.3 * torch.randn_like(embeddings)
    folder = tmp_path_factory.mktemp("merged")
    save_merged(folder, Merger(model.config.vision_config.hidden_size, model.config.text_config.hidden_size), model)
    return folder


def test_a_token_is_a_square_of_four_patches() -> None:
    rows = torch.arange(36.0)[:, None].expand(36, 5)
    tokens = by_token(rows)
    assert tokens.shape == (9, 4, 5)
    assert tokens[0, :, 0].tolist() == [0, 1, 6, 7]
    assert tokens[5, :, 0].tolist() == [16, 17, 22, 23]
    assert torch.equal(by_token(torch.stack([rows, -rows]))[1], -tokens)


def test_features_are_those_of_a_family_that_merges() -> None:
    generator = torch.Generator().manual_seed(0)
    encoder, keys, attention = (torch.randn(16, width, generator=generator) for width in (6, 3, 1))
    merger = Merger(6, 8)
    merged = merged_features(VisualFeatures(encoder, encoder, (4, 4), cls_attention=attention[:, 0], keys=keys), merger)
    assert merged.grid == (2, 2)
    own = [2, 3, 6, 7]  # of the second token
    torch.testing.assert_close(merged.encoder[1], encoder[own].mean(dim=0))
    assert merged.keys is not None
    torch.testing.assert_close(merged.keys[1], keys[own].mean(dim=0))
    assert merged.cls_attention is not None
    torch.testing.assert_close(merged.cls_attention[1], attention[own].sum())
    normed = torch.nn.functional.layer_norm(encoder[own], (6,))  # as it is before training
    expected = merger.linear_2(torch.nn.functional.gelu(merger.linear_1(normed.flatten())))
    torch.testing.assert_close(merged.embeds[1], expected.detach())


def expected(folder: Path, query: str) -> dict[tuple[str, str], tuple[str, float]]:
    """One question after the other, by transformers' own generation."""
    model = InLLM(TRAINED, add_special_tokens=False)
    merger = load_merged(folder, model.model)
    processor = pruning_processor(str(TRAINED), "float32")
    embed, tokenizer = model.model.get_input_embeddings(), model.processor.tokenizer

    def rows(text: str) -> Any:
        return embed(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])).detach()

    answers = {}
    [picture] = pictures("test", 4)
    features = merged_features(features_of(processor, picture.paint()), merger)
    for arm in ARMS:
        policy = PruningPolicy.parse(arm.policy_for(picture.label))
        kept = plan_tokens(features, policy, rows(f" {query}")).embeds
        for index, question in enumerate(picture.questions):
            whole = torch.cat([rows("USER: "), kept, rows(f"\n{question.text} ASSISTANT:")])[None]
            mask = torch.ones(whole.shape[:2], dtype=torch.long)
            [ids] = model.model.generate(
                inputs_embeds=whole, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False
            )
            answers[arm.name, picture.name(index)] = tokenizer.decode(ids, skip_special_tokens=True), len(kept)
    return answers


def test_answers_are_those_of_transformers_over_merged_tokens(folder: Path) -> None:
    [picture] = pictures("test", 4)
    pending = [(number, range(len(picture.questions))) for number in range(len(ARMS))]
    pairs = [pair for batch in Offline(str(TRAINED), folder).answers(picture, ARMS, pending) for pair in batch]
    answers = {(ARMS[number].name, answer.question): (answer.text, answer.tokens) for number, answer in pairs}
    assert answers == expected(folder, "red")
    assert {tokens for _, tokens in answers.values()} == {144, 20}


def test_the_likeness_to_the_text_is_that_to_the_words_of_this_language_model(folder: Path) -> None:
    offline = Offline(str(TRAINED), folder)
    words = offline._language.model.get_input_embeddings().weight
    [picture] = pictures("test", 4)
    merger = load_merged(folder, offline._language.model)
    features = merged_features(features_of(offline._processor, picture.paint()), merger)
    policy = PruningPolicy.parse({"rank_by": "relevance", "budget": fixed(20)}).resolve(offline._processor.family)
    plan = offline._plan(features, policy, (40, 41))
    assert torch.equal(plan.order, plan_tokens(features, policy, words[40:42].detach()).order)
    assert not torch.equal(plan.order, offline._processor.runtime.local.plan(features, policy, (40, 41)).order)


def test_an_ablation_asks_the_model_with_the_merger(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_vtprune_evaluation.offline.CONTEXT", context())
    options = ["--offline", "--ablation", "divprune-features", "--questions", "3"]
    evaluate([*options, "--merged", str(folder), "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["about"]["model"] == weights_digest(str(folder)) != weights_digest(str(TRAINED))
    unpruned, *pruned = results["results"]
    assert unpruned["mean_tokens"] == 144
    assert [result["arm"] for result in pruned[:3]] == ["projected @64", "encoder @64", "both @64"]
    assert set(results["paired_by_kind"]) == {*unpruned["by_kind"], "all"}
    for pairs in results["paired_by_kind"].values():
        assert {pair["arm"] for pair in pairs} == {f"projected @{keep}" for keep in (64, 36, 18)}
        assert {pair["row"] for pair in pairs} == {"encoder", "both"}


@pytest.mark.parametrize(
    "options",
    [
        ["--ablation", "resprune-features"],
        ["--offline"],
        ["--offline", "--ablation", "eadaprune-solver"],
        ["--offline", "--ablation", "resprune-features", "--model", str(TRAINED)],
        ["--offline", "--ablation", "resprune-features", "--gallery"],
    ],
)
def test_what_a_merger_does_not_go_with(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        evaluate([*options, "--merged", "build/merged"])
    assert refused.value.code == 2
    assert "--merged: needs --offline and --ablation" in capsys.readouterr().err


def test_a_folder_without_a_merger_is_refused(folder: Path, tmp_path: Path) -> None:
    model = InLLM(TRAINED).model
    with pytest.raises(ValueError, match=r"expected a folder that python -m training\.merged wrote"):
        load_merged(tmp_path, model)
    weights = load_file(folder / FILE)
    weights.pop("merger.norm.bias")
    save_file(weights, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"training\.merged wrote .*norm\.bias"):
        load_merged(tmp_path, model)

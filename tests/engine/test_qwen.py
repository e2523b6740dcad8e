"""Qwen-VL on the real engine: pruned answers are those of transformers, whose positions are worked out by hand.

Each family runs through the same tests. The engines have every cache on and prefill in chunks smaller than an image.
The grid runs over the shapes of images, their number, conversations of one and two turns, and budgets.
"""

import json
import os
import random
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import ImageOps

from tests.engine.qwen_stock_answers import answers, questions, video
from tests.support.engines import BLOCK, MODEL_RUNNERS, TOLERANCE, Ask, Engine, run_without_plugin, uncached, worst
from tests.support.images import sample_images
from tests.support.qwen2_5_vl import IMAGE, SYSTEM, VIDEO, QwenReference, answered, ask_about
from tests.support.qwen2_5_vl_answers import Picture, compare, pruned, reports
from tests.support.qwen3_vl import Qwen3Reference
from vllm_vtprune.cache import BoundedTable, FeatureCache

pytestmark = pytest.mark.engine

VERIFY = bool(os.environ.get("VTPRUNE_VERIFY"))
SHAPES = ((1, 4), (1, 2), (1, 1), (2, 1), (4, 1))  # width to height
BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)
GRID = list(product(range(len(SHAPES)), (1, 2, 3, 4), (1, 2), BUDGETS))
CASES = GRID if VERIFY else random.Random(2).sample(GRID, 12)
SUBJECTS = ("bus", "cat", "harbour", "cup")
TOKENS = {"budget": {"type": "tokens", "keep": 24}}


class Family(NamedTuple):
    """Fixtures of its checkpoint and engine, and the classes that serve it."""

    checkpoint: str
    engine: str
    reference: type[QwenReference]
    processor: str
    stock: str
    pruned: str


FAMILIES = {
    "qwen2_5_vl": Family(
        "qwen_checkpoint",
        "qwen",
        QwenReference,
        "Qwen2_5_VLMultiModalProcessor",
        "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",
        "vllm_vtprune.plugin.families.qwen2_5_vl.PrunedQwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": Family(
        "qwen3_checkpoint",
        "qwen3",
        Qwen3Reference,
        "Qwen3VLMultiModalProcessor",
        "vllm.model_executor.models.qwen3_vl.Qwen3VLForConditionalGeneration",
        "vllm_vtprune.plugin.families.qwen3_vl.PrunedQwen3VLForConditionalGeneration",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def checkpoint(family: Family, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(family.checkpoint)
    return path


@pytest.fixture(scope="module")
def engine(family: Family, model_runner: str, request: pytest.FixtureRequest) -> Engine:
    running: Engine = request.getfixturevalue(family.engine)
    return running


@pytest.fixture(scope="module")
def reference(family: Family, checkpoint: Path) -> QwenReference:
    return family.reference(checkpoint)


@pytest.fixture(scope="module")
def pictures(reference: QwenReference) -> list[list[Picture]]:
    """For each of SHAPES, four pictures of some 100 to 250 tokens."""
    found = []
    for number, (width, height) in enumerate(SHAPES):
        side = (200_000 / (width * height)) ** 0.5
        row = []
        for index, photo in enumerate(sample_images(7)):
            if index in (1, 4, 5, 6):
                size = round(side * width * (1 - index / 20)), round(side * height * (1 - index / 20))
                image = ImageOps.fit(photo, size)
                row.append(Picture(image, f"qwen-{number}-{index}", reference.image(image)))
        found.append(row)
    return found


def test_greedy_answers_are_those_of_transformers(
    engine: Engine,
    reference: QwenReference,
    pictures: list[list[Picture]],
    record_property: Callable[[str, object], None],
) -> None:
    compared = []
    for shape, count, turns, keep in CASES:
        print(f"{SHAPES[shape][0]}:{SHAPES[shape][1]}, {count} images, {turns} turns, {keep:.0%} kept")
        policy = {"budget": {"type": "ratio", "keep": keep}}
        shown = [pictures[(shape + 2 * index) % len(SHAPES)][index] for index in range(count)]
        nouns = SUBJECTS[:count]
        texts = [f"Where is the {noun}?" for noun in nouns]
        at_once = count if turns == 1 else (count + 1) // 2
        prompt = ask_about(texts[0], IMAGE * at_once)
        asked = [(prompt, at_once)]
        if turns == 2:
            prompt = ask_about("And what is behind it?", IMAGE * (count - at_once), before=answered(prompt, "There."))
            asked.append((prompt, count))
        for turn, (said, images) in enumerate(asked):
            answer = engine.ask(
                Ask(
                    said,
                    [picture.image for picture in shown[:images]],
                    {**policy, "texts": texts[:images]},
                    [picture.uuid for picture in shown[:images]],
                )
            )
            media = [
                pruned(engine, reference, picture, policy, [noun])
                for picture, noun in zip(shown[:images], nouns, strict=False)
            ]
            compared.append(compare(reference, answer, said, media))
            assert [(report.kept_tokens, report.visual_tokens, report.nouns) for report in reports(answer)] == [
                (len(medium.kept), len(medium.embeds), (noun,)) for medium, noun in zip(media, nouns, strict=False)
            ]
            if turn == 1:  # the keys and values of the first turn's images are at hand
                before = len(reference.prompt_ids_of(asked[0][0], media[:at_once]))
                assert answer.prefix_hits >= (before - BLOCK) // BLOCK * BLOCK
    record_property("cases", len(CASES))
    record_property("comparisons", len(compared))
    record_property("worst_logprob_difference", max(comparison.worst for comparison in compared))
    record_property("ties", sum(comparison.ties for comparison in compared))


def test_the_positions_by_hand_are_those_of_transformers(
    reference: QwenReference, pictures: list[list[Picture]]
) -> None:
    """Where nothing is pruned, transformers works positions out itself."""
    media = [pictures[0][0].whole, reference.video(video()[0], 1.0), pictures[3][1].whole]
    prompt = ask_about("What is it?", IMAGE + VIDEO + IMAGE)
    ids = torch.tensor([reference.prompt_ids_of(prompt, media)])
    kinds = (ids == reference.image_token).int() + 2 * (ids == reference.video_token).int()
    grids = [torch.tensor([[medium.grid[0], 2 * medium.grid[1], 2 * medium.grid[2]]]) for medium in media]
    expected, delta = reference.model.model.get_rope_index(
        ids,
        mm_token_type_ids=kinds,
        image_grid_thw=torch.cat([grids[0], grids[2]]),
        video_grid_thw=grids[1],
        second_per_grid_ts=torch.tensor([1.0]),
    )
    positions = reference.positions(ids[0].tolist(), media, answer=2)
    assert torch.equal(positions[:, :-2], expected[:, 0])
    assert positions[:, -1].tolist() == [len(ids[0]) + 1 + int(delta)] * 3


def test_other_positions_would_be_seen(
    engine: Engine,
    reference: QwenReference,
    pictures: list[list[Picture]],
    record_property: Callable[[str, object], None],
) -> None:
    """Numbered without gaps, or with the text one grid width after the image, as `recompute_mrope_positions` has it."""
    prompt = ask_about("Where is the bus?")
    policy = {"budget": {"type": "ratio", "keep": 0.5}, "texts": ["Where is the bus?"]}
    gaps = []
    for picture in (pictures[0][0], pictures[4][0]):  # portrait, landscape
        answer = engine.ask(Ask(prompt, [picture.image], policy, [picture.uuid]))
        medium = pruned(engine, reference, picture, {"budget": policy["budget"]}, ["bus"])
        ids = reference.prompt_ids_of(prompt, [medium])
        right = reference.positions(ids, [medium], answer=7)
        in_order = torch.arange(right.shape[1]).expand(3, -1)
        shifted = right.clone()
        after = ids.index(reference.image_token) + len(medium.kept)
        shifted[:, after:] += 1
        for wrong in (in_order, shifted):
            logprobs = reference.logprobs_at(wrong, ids, [medium], answer.token_ids)
            gaps.append(worst(answer, logprobs))
    assert min(gaps) > 2 * TOLERANCE
    record_property("smallest_gap", min(gaps))


def test_pruned_unpruned_and_cached_images_in_every_order(engine: Engine, reference: QwenReference) -> None:
    for number, order in enumerate(permutations(range(3))):
        images = [ImageOps.fit(image, (224, 336)) for image in sample_images(3, stamp=f"order {number}")]
        pictures = [
            Picture(image, f"qwen-order-{number}-{index}", reference.image(image)) for index, image in enumerate(images)
        ]
        parts = [(pictures[0], TOKENS, "bus"), (pictures[1], False, "cat"), (pictures[2], TOKENS, "dog")]
        seen, _, noun = parts[2]
        engine.ask(Ask(ask_about("It?"), [seen.image], {**TOKENS, "texts": [f"the {noun}"]}, [seen.uuid]))
        in_order = [parts[index] for index in order]
        request = Ask(
            ask_about("Compare them.", IMAGE * 3),
            [picture.image for picture, _, _ in in_order],
            {
                "images": [policy for _, policy, _ in in_order],
                "texts": [f"the {noun}" for _, _, noun in in_order],
            },
            [picture.uuid for picture, _, _ in in_order],
        )
        encoded_before = engine.encodings()
        answer, again = engine.ask(request), engine.ask(request)
        assert engine.encodings() - encoded_before == 1
        media = [
            pruned(engine, reference, picture, policy, [noun]) if policy else picture.whole
            for picture, policy, noun in in_order
        ]
        for each, cached in ((answer, [index == 2 for index in order]), (again, [index != 1 for index in order])):
            compare(reference, each, request.prompt, media)
            assert [report.cached for report in reports(each)] == cached
        # the unpruned one is the stock item, for whoever asks for it
        unpruned = engine.ask(Ask(ask_about("Cat?"), [pictures[1].image], uuids=[pictures[1].uuid]))
        compare(reference, unpruned, ask_about("Cat?"), [pictures[1].whole])


def test_an_item_left_by_a_stock_request_is_taken_between_pruned_ones(engine: Engine, reference: QwenReference) -> None:
    images = [ImageOps.fit(image, (336, 224)) for image in sample_images(2, stamp="left")]
    pictures = [Picture(image, f"qwen-left-{i}", reference.image(image)) for i, image in enumerate(images)]
    uuids = [picture.uuid for picture in pictures]
    engine.ask(Ask(ask_about("Cat?"), images[:1], uuids=uuids[:1]))
    prompt = ask_about("Compare them.", IMAGE * 2)
    answer = engine.ask(Ask(prompt, images, {"images": [False, TOKENS], "texts": ["", "the bus"]}, uuids))
    compare(reference, answer, prompt, [pictures[0].whole, pruned(engine, reference, pictures[1], TOKENS, ["bus"])])


def test_requests_in_one_batch_answer_as_alone(engine: Engine, reference: QwenReference) -> None:
    images = [ImageOps.fit(image, (300, 260)) for image in sample_images(4, stamp="batch")]
    pictures = [Picture(image, f"qwen-batch-{i}", reference.image(image)) for i, image in enumerate(images)]
    policies = [TOKENS, False, TOKENS, None]
    prompt = ask_about("Where is the bus?")
    asked = [
        Ask(prompt, [picture.image], {**policy, "texts": ["the bus"]} if policy else policy, [picture.uuid])
        for picture, policy in zip(pictures, policies, strict=True)
    ]
    for answer, picture, policy in zip(engine.ask_together(asked), pictures, policies, strict=True):
        medium = pruned(engine, reference, picture, policy, ["bus"]) if policy else picture.whole
        compare(reference, answer, prompt, [medium])


def test_videos_pass_unpruned_in_either_order(engine: Engine, reference: QwenReference) -> None:
    frames, metadata = video()
    shown = reference.video(frames, 1.0)
    for index, (media, image) in enumerate(zip((IMAGE + VIDEO, VIDEO + IMAGE), sample_images(2, "video"), strict=True)):
        image = ImageOps.fit(image, (224, 280))
        picture = Picture(image, f"qwen-video-{index}", reference.image(image))
        prompt = ask_about("What moves before the bus?", media)
        answer = engine.ask(
            Ask(prompt, [image], {**TOKENS, "texts": ["the bus"]}, [picture.uuid], videos=[(frames, metadata)])
        )
        kept = pruned(engine, reference, picture, TOKENS, ["bus"])
        compare(reference, answer, prompt, [kept, shown] if index == 0 else [shown, kept])
        expected = [(24, None), (len(shown.embeds), "unsupported_modality")]
        found = [(report.kept_tokens, report.bypass_reason) for report in reports(answer)]
        assert found == (expected if index == 0 else expected[::-1])
    alone = engine.ask(Ask(ask_about("What moves?", VIDEO), (), TOKENS, videos=[(frames, metadata)]))
    compare(reference, alone, ask_about("What moves?", VIDEO), [shown])
    assert [(report.method, report.bypass_reason) for report in reports(alone)] == [
        ("resprune", "unsupported_modality")
    ]


def test_the_size_asked_for_is_the_size_pruned(engine: Engine, reference: QwenReference) -> None:
    [image] = [ImageOps.fit(image, (500, 400)) for image in sample_images(1, stamp="size")]
    policy = {"budget": {"type": "ratio", "keep": 0.5}, "text": {"query": "bus"}}
    counts = []
    for options in ({}, {"max_pixels": 56_000}, {"max_pixels": 112_000}, {"min_pixels": 400_000}):
        encoded_before = engine.encodings()
        answer = engine.ask(Ask(ask_about("Where?"), [image], policy, processor_kwargs=options))
        whole = reference.image(image, **options)
        [report] = reports(answer)
        counts.append(report.visual_tokens)
        assert report.visual_tokens == len(whole.embeds)
        assert engine.encodings() - encoded_before == 1
    assert len(set(counts)) == 4


def test_a_report_that_was_forgotten_is_made_anew_at_the_size_asked_for(
    engine: Engine, reference: QwenReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's cache holds the item; ours knows neither what was done to it nor its features."""
    [image] = [ImageOps.fit(image, (500, 400)) for image in sample_images(1, stamp="forgotten")]
    policy = {"budget": {"type": "ratio", "keep": 0.5}, "text": {"query": "bus"}}
    request = Ask(ask_about("Where?"), [image], policy, processor_kwargs={"max_pixels": 56_000})
    first = engine.ask(request)
    monkeypatch.setattr(engine.runtime, "planned", BoundedTable(8))
    monkeypatch.setattr(engine.runtime.encoder, "cache", FeatureCache(2**30))
    again = engine.ask(request)
    assert uncached(again.images) == uncached(first.images)
    assert [report.cached for report in reports(again)] == [True]
    assert [features.grid for features in engine.runtime.encoder.cache._entries.values()] == [
        reference.image(image, max_pixels=56_000).grid[1:]
    ]


def test_keeping_every_token_is_the_unpruned_answer(engine: Engine, reference: QwenReference) -> None:
    [image] = [ImageOps.fit(image, (200, 400)) for image in sample_images(1, stamp="all")]
    answer = engine.ask(Ask(ask_about("Where?"), [image], {"budget": {"type": "tokens", "keep": 5000}}))
    compare(reference, answer, ask_about("Where?"), [reference.image(image)])
    assert [report.bypass_reason for report in reports(answer)] == ["budget_not_below_tokens"]


def test_the_text_of_a_prompt_is_what_its_turns_say(engine: Engine) -> None:
    prompt = answered(ask_about("Where is the bus?"), "At the harbour.")
    prompt = ask_about("Is the dog there?", before=prompt)
    [one, two] = [ImageOps.fit(image, (112, 112)) for image in sample_images(2, stamp="text")]
    answer = engine.ask(Ask(prompt, [one, two], {"budget": {"type": "tokens", "keep": 4}}))
    assert [report.nouns for report in reports(answer)] == [("bus", "harbour", "dog")] * 2
    assert SYSTEM in prompt


@pytest.mark.verify  # starts another engine; `make test` compares LLaVA-1.5's with stock vLLM's
def test_off_is_stock(engine: Engine, checkpoint: Path, family: Family, model_runner: str, tmp_path: Path) -> None:
    """Bit for bit."""
    output = tmp_path / "answers.json"
    environment = MODEL_RUNNERS[model_runner]
    run_without_plugin("tests.engine.qwen_stock_answers", checkpoint, output, environment=environment)
    stock = json.loads(output.read_text())
    assert stock["processor"] == family.processor
    assert stock["worker"]["model_class"] == family.stock
    [worker] = engine.llm.collective_rpc("worker_state")
    assert worker["model_class"] == family.pruned
    assert "vllm_vtprune.plugin.vision" not in worker["modules"]
    assert len(stock["answers"]) == len(questions())
    for pruning in (None, False):
        for expected, found in zip(stock["answers"], answers(engine, pruning), strict=True):
            assert found == expected
    assert len({tuple(token_ids) for _, token_ids, _ in stock["answers"]}) > 8, "answers depend on what was asked"

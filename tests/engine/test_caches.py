"""Caches and mixtures change how fast an answer comes, never the answer or its report.

Whatever an engine with caches answers is compared with an engine on which every cache is off. Each test has images of
its own, so that it knows what the caches hold.
"""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import BLOCK, Answer, Ask, Engine, ask_about, assert_same, reports, worst_difference
from tests.support.images import sample_images
from vllm_vtprune.cache import FeatureCache
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint

pytestmark = pytest.mark.engine

BUS, BUS_AGAIN, DOG = "Where is the bus?", "Is there a bus?", "Where is the dog?"
ENERGY = {"budget": {"type": "energy", "threshold": 0.98, "min_tokens": 1}}  # looks at the text
UNIFORM = {"method": "uniform", "budget": {"type": "ratio", "keep": 1 / 3}}  # does not
TOKENS = {"budget": {"type": "tokens", "keep": 48}}
RANDOM = {"method": "random", "budget": {"type": "tokens", "keep": 64}}
LONG = "You look at pictures with great care and say in plain words what a traveller would like to know of them. " * 4


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


def flags(answer: Answer) -> list[bool]:
    return [image.cached for image in reports(answer)]


def kept(answer: Answer) -> list[int]:
    return [image.kept_tokens for image in reports(answer)]


def first_image_token(engine: Engine, answer: Answer) -> int:
    return answer.prompt_ids.index(engine.llm.model_config.hf_config.image_token_index)


def test_two_policies_two_questions_and_two_turns_encode_an_image_once(
    cached: Engine, uncached: Engine, record_property: Callable[[str, object], None]
) -> None:
    images = sample_images(2, stamp="turns")
    encoded_before, reference_encoded_before = cached.encodings(), uncached.encodings()
    differences = []
    for image in images:
        for policy in (ENERGY, UNIFORM):
            for question in (BUS, DOG):
                first = ask_about(f"{question} {LONG}")
                second = ask_about("And what is behind it?", images=0, before=f"{first} Nothing. ")
                turns = []
                for prompt in (first, second):
                    request = Ask(prompt, [image], {**policy, "texts": [question]})
                    turns.append(cached.ask(request))
                    differences.append(assert_same(turns[-1], uncached.ask(request)))
                assert flags(turns[0]) == [policy is UNIFORM and question == DOG]
                assert flags(turns[1]) == [True]
                assert turns[1].prefix_hits == whole_blocks(len(turns[0].prompt_ids)) > turns[0].prefix_hits
    assert cached.encodings() - encoded_before == len(images)
    assert uncached.encodings() - reference_encoded_before == len(differences)  # its caches are really off
    record_property("comparisons", len(differences))
    record_property("worst_logprob_difference", max(differences))


def test_a_conversation_that_grows_by_an_image(cached: Engine, uncached: Engine) -> None:
    image_a, image_b = sample_images(2, stamp="grows")
    encoded_before = cached.encodings()
    first = ask_about(f"{BUS} {LONG}")
    second = ask_about(DOG, before=f"{first} Nothing. ")
    third = ask_about("Anything else?", images=0, before=f"{second} No. ")
    answers = []
    for prompt, images, texts in (
        (first, [image_a], [BUS]),
        (second, [image_a, image_b], [BUS, DOG]),
        (third, [image_a, image_b], [BUS, DOG]),
    ):
        request = Ask(prompt, images, {**ENERGY, "texts": texts})
        answers.append(cached.ask(request))
        assert_same(answers[-1], uncached.ask(request))
    assert [flags(answer) for answer in answers] == [[False], [True, False], [True, True]]
    lengths = [len(answer.prompt_ids) for answer in answers]
    assert [answer.prefix_hits for answer in answers] == [0, *map(whole_blocks, lengths[:2])]
    assert cached.encodings() - encoded_before == 2


def test_pruned_unpruned_and_cached_images_in_every_order(
    cached: Engine, uncached: Engine, record_property: Callable[[str, object], None]
) -> None:
    images = iter(sample_images(18, stamp="orders"))
    differences = []
    for order in permutations(range(3)):
        encoded_before = cached.encodings()
        parts = [
            (next(images), TOKENS, BUS),  # pruned, never seen
            (next(images), False, "How is the weather?"),  # unpruned, never seen
            (next(images), ENERGY, DOG),  # pruned, seen a moment ago
        ]
        seen, seen_policy, seen_text = parts[2]
        cached.ask(Ask(ask_about(seen_text), [seen], {**seen_policy, "texts": [seen_text]}))
        in_order, policies, texts = zip(*(parts[i] for i in order), strict=True)
        prompt = ask_about("Compare them.", images=3)
        request = Ask(prompt, in_order, {"images": list(policies), "texts": list(texts)})
        answer = cached.ask(request)
        differences.append(assert_same(answer, uncached.ask(request)))
        assert flags(answer) == [part == 2 for part in order]
        assert [kept(answer)[order.index(part)] for part in (0, 1)] == [48, 576]
        assert cached.encodings() - encoded_before == 2  # of the pruned ones; the engine encodes the other
        again = cached.ask(request)
        differences.append(assert_same(again, answer))
        assert flags(again) == [part != 1 for part in order]
    record_property("comparisons", len(differences))
    record_property("worst_logprob_difference", max(differences))


def test_identical_requests(cached: Engine, uncached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan = cached.runtime.local.plan
    monkeypatch.setattr(cached.runtime.local, "plan", lambda *arguments: planned.append(1) or plan(*arguments))
    image_a, image_b = sample_images(2, stamp="identical")
    for request in (
        Ask(ask_about(BUS), [image_a], ENERGY),
        Ask(ask_about(BUS), [image_a], False),
        # the first comes twice in one prompt
        Ask(ask_about("Which is older?", images=3), [image_b, image_a, image_b], TOKENS),
    ):
        expected = uncached.ask(request)
        answers = [cached.ask(request) for _ in range(3)]
        for answer in answers:
            assert_same(answer, expected)
        assert [answer.prefix_hits for answer in answers] == [0, *[whole_blocks(len(expected.prompt_ids) - 1)] * 2]
        if expected.images is not None:
            assert [all(flags(answer)) for answer in answers] == [False, True, True]
    assert len(planned) == 1 + 3  # the one image of the first request, the three of the last


def test_one_image_twice_in_a_prompt_under_two_policies(cached: Engine, uncached: Engine) -> None:
    (image,) = sample_images(1, stamp="twice")
    encoded_before = cached.encodings()
    request = Ask(ask_about("Which?", images=3), [image] * 3, {"images": [TOKENS, False, UNIFORM], "texts": [BUS] * 3})
    answer = cached.ask(request)
    assert_same(answer, uncached.ask(request))
    assert kept(answer) == [48, 576, 192]
    assert cached.encodings() - encoded_before == 1


def test_images_encoded_together_are_planned_as_if_alone(cached: Engine, uncached: Engine) -> None:
    images = sample_images(12, stamp="together")[::4]
    encoded_before = cached.encodings()
    together = cached.ask(Ask(ask_about("Compare them.", images=3), images, {**ENERGY, "texts": [BUS, DOG, BUS]}))
    assert cached.encodings() - encoded_before == len(images)
    alone = [
        uncached.ask(Ask(ask_about("Look."), [image], {**ENERGY, "texts": [text]}))
        for image, text in zip(images, (BUS, DOG, BUS), strict=True)
    ]
    assert together.images == [reports(answer)[0] for answer in alone]
    assert len(set(kept(together))) == len(images)  # no two could be mixed up unseen


def test_the_feature_cache_works_where_vllm_hashes_no_images(uncached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached.runtime.local, "cache", FeatureCache(2**30))
    (image,) = sample_images(1, stamp="no hashes")
    encoded_before = uncached.encodings()
    for policy in (ENERGY, UNIFORM, ENERGY):
        uncached.ask(Ask(ask_about(BUS), [image], policy))
    assert uncached.encodings() - encoded_before == 1


@pytest.mark.parametrize(
    ("name", "policy", "texts", "shared"),
    [
        ("same nouns", TOKENS, (BUS, BUS_AGAIN), True),
        ("other nouns", TOKENS, (BUS, DOG), False),
        ("every word", {**TOKENS, "text": {"clean": False}}, (BUS, BUS_AGAIN), False),
        ("own query", {**TOKENS, "text": {"query": BUS}}, (BUS, DOG), True),
        ("alpha 0", {**TOKENS, "alpha": 0.0}, (BUS, DOG), True),
        ("uniform", UNIFORM, (BUS, DOG), True),
        ("random", RANDOM, (BUS, DOG), True),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_texts_share_an_item_where_they_keep_the_same_tokens(
    cached: Engine, uncached: Engine, name: str, policy: dict[str, Any], texts: tuple[str, str], shared: bool
) -> None:
    (image,) = sample_images(1, stamp=name)
    encoded_before = cached.encodings()
    requests = [Ask(ask_about("Tell me."), [image], {**policy, "texts": [text]}) for text in texts]
    answers = [cached.ask(request) for request in requests]
    for request, answer in zip(requests, answers, strict=True):
        assert_same(answer, uncached.ask(request))
    assert [flags(answer) for answer in answers] == [[False], [shared]]
    assert (answers[1].prefix_hits > 0) == shared
    assert cached.encodings() - encoded_before == 1


def test_the_prefix_cache_never_reaches_into_an_image_under_another_policy(cached: Engine, uncached: Engine) -> None:
    image, other = sample_images(2, stamp="prefix")
    prompt = ask_about(BUS, before=LONG)
    for request in (
        Ask(prompt, [image], {**RANDOM, "seed": 1}),
        Ask(prompt, [image], {**RANDOM, "seed": 2}),  # the same prompt, token by token
        Ask(prompt, [image], {"method": "uniform", "budget": RANDOM["budget"]}),  # again
        Ask(prompt, [image], {"budget": RANDOM["budget"], "texts": [BUS]}),  # again
        Ask(prompt, [image], {"budget": RANDOM["budget"], "texts": [DOG]}),  # again
        Ask(prompt, [other], {**RANDOM, "seed": 1}),  # again
        Ask(prompt, [image], {"method": "none"}),
        Ask(prompt, [other]),
    ):
        answer = cached.ask(request)
        before_image = first_image_token(cached, answer)
        assert before_image >= 2 * BLOCK
        assert answer.prefix_hits <= before_image
        assert_same(answer, uncached.ask(request))
        repeated = cached.ask(request)
        assert repeated.prefix_hits == whole_blocks(len(answer.prompt_ids) - 1) > before_image
        assert_same(repeated, answer)
    assert answer.prefix_hits == whole_blocks(before_image)  # up to there it does


def test_no_key_and_pruning_off_are_one_item(cached: Engine) -> None:
    (image,) = sample_images(1, stamp="off")
    answers = [cached.ask(Ask(ask_about(BUS), [image], pruning)) for pruning in (None, False, {"method": "none"})]
    assert [answer.prefix_hits > 500 for answer in answers] == [False, True, True]
    assert kept(answers[2]) == [576]


def test_an_image_named_by_its_uuid_is_served_from_the_feature_cache(cached: Engine, uncached: Engine) -> None:
    (image,) = sample_images(1, stamp="uuid")
    encoded_before = cached.encodings()
    cached.ask(Ask(ask_about(BUS), [image], TOKENS, uuids=["the photograph"]))
    for pruning, known in (
        ({**TOKENS, "texts": [BUS]}, True),
        ({**ENERGY, "texts": [DOG]}, False),
        (UNIFORM, False),
        ({**UNIFORM, "texts": [DOG]}, True),
    ):
        answer = cached.ask(Ask(ask_about(BUS), [None], pruning, uuids=["the photograph"]))
        assert_same(answer, uncached.ask(Ask(ask_about(BUS), [image], pruning)))
        assert flags(answer) == [known]
    assert cached.encodings() - encoded_before == 1

    mixed = {"images": [RANDOM, None], **TOKENS, "texts": [DOG, BUS]}
    (other,) = sample_images(1, stamp="uuid too")
    by_name = Ask(ask_about(BUS, images=2), [None, other], mixed, uuids=["the photograph", None])
    in_full = Ask(ask_about(BUS, images=2), [image, other], mixed)
    assert_same(cached.ask(by_name), uncached.ask(in_full))


@pytest.mark.parametrize("pruning", [TOKENS, {"method": "none"}, None], ids=["pruned", "off", "absent"])
def test_an_unknown_uuid_without_data_is_refused(cached: Engine, pruning: Any) -> None:
    with pytest.raises(ValueError, match="data is not provided"):
        cached.ask(Ask(ask_about(BUS), [None], pruning, uuids=[f"never seen {pruning}"]))
    (image,) = sample_images(1, stamp="after a refusal")
    assert cached.ask(Ask(ask_about(BUS), [image], TOKENS)).token_ids


def test_an_image_that_every_cache_forgot_is_refused(
    chunked: Engine, uncached: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_a, image_b = sample_images(2, stamp="forgotten")
    uncached.ask(Ask(ask_about(BUS), [image_a], TOKENS, uuids=["forgotten"]))
    with pytest.raises(ValueError, match="forgotten but data is not provided"):
        uncached.ask(Ask(ask_about(BUS), [None], TOKENS, uuids=["forgotten"]))

    monkeypatch.setattr(chunked.runtime.local, "cache", FeatureCache(0))
    chunked.ask(Ask(ask_about(BUS), [image_a], TOKENS, uuids=["forgotten"]))
    chunked.ask(Ask(ask_about(BUS), [image_b], TOKENS))  # takes the one place in the table of reports
    with pytest.raises(ValueError, match="forgotten but data is not provided"):
        chunked.ask(Ask(ask_about(BUS), [None], TOKENS, uuids=["forgotten"]))


def test_chunks_smaller_than_an_image(
    chunked: Engine, uncached: Engine, record_property: Callable[[str, object], None]
) -> None:
    scheduler = chunked.llm.llm_engine.vllm_config.scheduler_config
    assert (scheduler.max_num_batched_tokens, scheduler.enable_chunked_prefill) == (64, True)
    image_a, image_b, image_c = sample_images(3, stamp="chunks")
    differences = []
    for request in (
        Ask(ask_about(BUS), [image_a], {"budget": {"type": "tokens", "keep": 200}}),
        Ask(ask_about(BUS, before=LONG), [image_a], UNIFORM),
        Ask(ask_about(BUS), [image_a]),
        Ask(ask_about(BUS, images=3), [image_a, image_b, image_c], {"images": [UNIFORM, False, RANDOM]}),
        Ask(ask_about(BUS, images=3), [image_c, image_a, image_b], {"images": [RANDOM, UNIFORM, False]}),
    ):
        expected = uncached.ask(request)
        assert len(expected.prompt_ids) > 2 * 64
        for _ in range(2):
            answer = chunked.ask(request)
            differences.append(assert_same(answer, expected))
        assert answer.prefix_hits == whole_blocks(len(expected.prompt_ids) - 1)
    record_property("comparisons", len(differences))
    record_property("worst_logprob_difference", max(differences))


def test_an_item_that_outlived_its_report_is_reported_in_full(chunked: Engine, uncached: Engine) -> None:
    image_a, image_b = sample_images(2, stamp="reports")
    encoded_before = chunked.encodings()
    requests = [
        Ask(ask_about(BUS), [image], ENERGY, uuids=[f"report {i}"]) for i, image in enumerate((image_a, image_b))
    ]
    expected = [uncached.ask(request) for request in requests]
    by_name = [Ask(ask_about(BUS), [None], ENERGY, uuids=[f"report {i}"]) for i in range(2)]
    for asked, known in ((requests, False), (requests, True), (by_name, True)):  # the table holds one report
        for request, answer in zip(asked, expected, strict=True):
            got = chunked.ask(request)
            assert_same(got, answer)
            assert flags(got) == [known]
    assert chunked.encodings() - encoded_before == 2


def test_weights_that_the_engine_reloads_are_those_of_pruned_images_too(cached: Engine, checkpoint: Path) -> None:
    """The engine's own encoder is the reference: with every token kept, both give the same answer."""
    every_token = {"budget": {"type": "tokens", "keep": 576}}
    (image,) = sample_images(1, stamp="reloaded")
    before = cached.ask(Ask(ask_about(BUS), [image], every_token))
    try:
        write_llava_checkpoint(checkpoint, size="tiny", dtype="float32", seed=1)
        cached.llm.collective_rpc("reload_weights")
        after = cached.ask(Ask(ask_about(BUS), [image], every_token))
        worst_difference(after.logprobs, cached.ask(Ask(ask_about(BUS), [image])).logprobs)
        assert after.logprobs[0] != before.logprobs[0]
        assert flags(after) == [False]
    finally:
        write_llava_checkpoint(checkpoint, size="tiny", dtype="float32")
        cached.llm.collective_rpc("reload_weights")
        cached.forget_prompts()
    again = cached.ask(Ask(ask_about(BUS), [image], every_token))
    assert_same(again, before)


def test_an_encoder_whose_rounding_moves_the_budget(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends a request whose item it knows with another count; it remembers longer than the processor."""
    counts = iter((48, 47, 48))
    plan = cached.runtime.local.plan

    def rounded(features: Any, policy: Any, *arguments: Any) -> Any:
        budget = policy.budget.model_copy(update={"keep": next(counts)})
        return plan(features, policy.with_budget(budget), *arguments)

    monkeypatch.setattr(cached.runtime.local, "plan", rounded)
    (image,) = sample_images(1, stamp="rounding")
    answers = []
    for _ in range(3):
        answers.append(cached.ask(Ask(ask_about(BUS), [image], TOKENS)))
        cached.llm.reset_mm_cache()
    assert [kept(answer) for answer in answers] == [[48], [47], [48]]
    assert [len(answer.token_ids) for answer in answers] == [8, 8, 8]
    assert answers[2].prefix_hits > answers[1].prefix_hits
    assert_same(answers[2], answers[0])

"""Families with tiles: vLLM says about pruned images what transformers says about the same kept tokens.

Prefill goes in chunks smaller than an image, and every cache is on. The reference is built from the checkpoint alone,
and reads what `plan_tokens` keeps, at positions from 0 without gaps.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.qwen_stock_answers import video
from tests.support.engines import MODEL_RUNNERS, TOLERANCE, Answer, Ask, Engine, run_without_plugin, running_engine
from tests.support.processes import state
from tests.support.reference import Reference
from tests.support.tiled import ASPECTS, FAMILIES, SMALL, Family, picture, pictures
from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune.report import ImageReport
from vllm_vtprune.text import extract_nouns

pytestmark = pytest.mark.engine

QUESTIONS = ("What does the astronaut wear?", "Where is the cat, and where is the cup?", "What is it?")
BUDGETS = (0.1, 0.3, 0.5, 0.7, 0.9)
GRID = list(product(range(len(ASPECTS)), (1, 2, 3, 4), BUDGETS))
CASES = GRID if os.environ.get("VTPRUNE_VERIFY") else Random(6).sample(GRID, 14)
TIE = 1e-4
"""Tokens whose log-probabilities in the reference are closer than this may change places."""


@pytest.fixture(scope="module", params=FAMILIES if os.environ.get("VTPRUNE_VERIFY") else ["llava_next"])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.write(tmp_path_factory.mktemp(family.name), image_size=SMALL)


@pytest.fixture(scope="module")
def stock(family: Family, checkpoint: Path, model_runner: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an engine without the plugin answers."""
    output = tmp_path_factory.mktemp("stock") / "answers.json"
    environment = MODEL_RUNNERS[model_runner]
    run_without_plugin("tests.engine.stock_tiled", family.name, checkpoint, output, environment=environment)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def engine(family: Family, checkpoint: Path, model_runner: str) -> Iterator[Engine]:
    environment = MODEL_RUNNERS[model_runner]
    with running_engine(checkpoint, family.name, environment=environment, **family.engine_options) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(family: Family, checkpoint: Path) -> Reference:
    return family.reference(checkpoint)


class Checker:
    """Asks the engine, and compares with the reference."""

    def __init__(self, family: Family, engine: Engine, reference: Reference) -> None:
        self.family, self.engine, self.reference = family, engine, reference
        self.differences: list[float] = []
        self.ties = 0
        self._embeds: dict[str, torch.Tensor] = {}

    def ask(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        names: Sequence[str],
        policies: Sequence[Any],
        texts: Sequence[str],
    ) -> Answer:
        """One request, whose i-th image the client calls `names[i]`. `policies`: False leaves an image unpruned."""
        pruning = {"images": list(policies), "texts": list(texts)}
        answer = self.engine.ask(Ask(prompt, images, pruning, list(names)))
        assert answer.images is not None
        read = [self.reads(*each) for each in zip(images, names, policies, texts, answer.images, strict=True)]
        prompt_ids = self.reference.prompt_ids(prompt, [len(embeds) for embeds in read])
        assert answer.prompt_ids == prompt_ids
        self.compare(answer, read)
        return answer

    def compare(self, answer: Answer, read: Sequence[torch.Tensor]) -> None:
        """vLLM's answer with what the reference says to the same prompt, in which it reads these embeddings."""
        logprobs = self.reference.logprobs(answer.prompt_ids, read, answer.token_ids)
        behind = logprobs.max(dim=1).values - logprobs[range(len(logprobs)), answer.token_ids]
        assert behind.max() < TIE, f"{answer.token_ids} is not {logprobs.argmax(dim=1).tolist()}"
        self.ties += int((behind > 0).sum())
        self.differences.append(
            max(
                abs(float(row[token]) - value)
                for step, row in zip(answer.logprobs, logprobs, strict=True)
                for token, value in step.items()
            )
        )
        assert self.differences[-1] < TOLERANCE

    def reads(self, image: Image.Image, name: str, policy: Any, text: str, report: ImageReport) -> torch.Tensor:
        """(T, d): what the reference's language model reads of an image."""
        if name not in self._embeds:
            self._embeds[name] = self.reference.visual_embeds(image)
        embeds = self._embeds[name]
        assert report.visual_tokens == len(embeds)
        if policy is False:
            assert (report.method, report.kept_tokens, report.bypass_reason) == ("none", len(embeds), None)
            return embeds
        features = self.engine.runtime.encoder.cache.get(name)
        assert features is not None
        nouns = self.reference.noun_embeds(extract_nouns(text))
        plan = plan_tokens(features, PruningPolicy.parse(policy), nouns, family=self.engine.processor.family)
        kept = self.reference.kept_embeds(embeds, plan.kept)
        assert report.kept_tokens == len(kept)
        assert report.energy == plan.energy
        return kept


@pytest.fixture(scope="module")
def checker(family: Family, engine: Engine, reference: Reference) -> Checker:
    return Checker(family, engine, reference)


def test_greedy_answers_are_those_of_transformers(
    checker: Checker, record_property: Callable[[str, object], None]
) -> None:
    """Aspect ratios from 1:4 to 4:1, 1 to 4 images, 10 % to 90 %, and a second turn, whose prefix is cached."""
    ask_about = checker.family.ask_about
    first_difference, hits = len(checker.differences), 0
    for number, (aspect, images, keep) in enumerate(CASES):
        indices = [(number + i) % 16 for i in range(images)]
        shapes = [ASPECTS[(aspect + 2 * i) % len(ASPECTS)] for i in range(images)]
        names = [f"{index}-{shape}" for index, shape in zip(indices, shapes, strict=True)]
        policy = {"budget": {"type": "ratio", "keep": keep}}
        texts = [QUESTIONS[(number + i) % len(QUESTIONS)] for i in range(images)]
        first = ask_about(texts[0], images=images)
        second = ask_about("Is there anything behind it?", images=0, before=f"{first} A dog. ")
        shown = pictures(indices, shapes)
        once = checker.ask(first, shown, names, [policy] * images, texts)
        again = checker.ask(second, shown, names, [policy] * images, texts)
        assert again.prefix_hits >= (len(once.prompt_ids) - 1) // 32 * 32
        assert [report.cached for report in again.images or ()] == [True] * images
        hits += again.prefix_hits
        print(f"{checker.family.name}: {images} images from {shapes[0]}, keep {keep}: {checker.differences[-1]:.1e}")
    differences = checker.differences[first_difference:]
    assert max(differences) < TOLERANCE
    record_property("requests", len(differences))
    record_property("worst_logprob_difference", max(differences))
    record_property("prefix_hits", hits)


@pytest.mark.parametrize(
    "policy",
    [
        {"method": "adaptprune", "budget": {"type": "ratio", "keep": 0.1}},
        {"method": "hired", "budget": {"type": "ratio", "keep": 0.2}},
        {"budget": {"type": "energy", "threshold": 0.9, "min_tokens": 1}},
        {"budget": {"type": "energy", "threshold": 0.99, "min_tokens": 1}},
        {"method": "uniform", "budget": {"type": "tokens", "keep": 1}},
        {"method": "last", "budget": {"type": "ratio", "keep": 1.0}},
    ],
    ids=lambda policy: f"{policy.get('method', 'resprune')}-{'-'.join(map(str, policy['budget'].values()))}",
)
def test_methods_and_budgets(policy: Any, checker: Checker) -> None:
    for number, aspect in enumerate(((1, 1), (3, 1), (1, 40), (300, 1))):
        text = QUESTIONS[number % len(QUESTIONS)]
        name = f"methods-{aspect}"
        checker.ask(checker.family.ask_about(text), [picture(number, aspect)], [name], [policy], [text])


def test_pruned_unpruned_and_cached_images_in_every_order(checker: Checker) -> None:
    tokens, energy = {"budget": {"type": "tokens", "keep": 20}}, {"budget": {"type": "energy", "threshold": 0.9}}
    for number, order in enumerate(permutations(range(4))):
        if number % 4 and not os.environ.get("VTPRUNE_VERIFY"):
            continue
        aspects = [ASPECTS[(number + 2 * i) % len(ASPECTS)] for i in range(4)]
        shown = pictures(range(4), aspects, stamp=f"orders {number}")
        names = [f"orders-{number}-{i}" for i in range(4)]
        policies = [tokens, False, energy, False]  # new, new, seen before, seen before
        ask_about = checker.family.ask_about
        for i in (2, 3):
            checker.ask(ask_about("Why?"), [shown[i]], [names[i]], [policies[i]], ["Where is the dog?"])
        answer = checker.ask(
            ask_about("Compare them.", images=4),
            [shown[i] for i in order],
            [names[i] for i in order],
            [policies[i] for i in order],
            ["Where is the bus?" if i == 0 else "Where is the dog?" for i in order],
        )
        assert [report.cached for report in answer.images or ()] == [i == 2 for i in order]


def test_without_a_text_the_prompt_s_nouns_count(engine: Engine, family: Family) -> None:
    policy = {"budget": {"type": "tokens", "keep": 10}}
    for number, prompt in enumerate(family.chat_forms):
        shown = picture(1, (1, 1), f"nouns {number}")
        answer = engine.ask(Ask(prompt.format(image=family.image, text="Where is the bus?"), [shown], policy))
        assert answer.images is not None
        assert [report.nouns for report in answer.images] == [("bus",)], prompt


@pytest.mark.verify
@pytest.mark.parametrize("family", ["internvl"], indirect=True, scope="module")
def test_a_client_may_ask_for_fewer_tiles(engine: Engine, family: Family) -> None:
    policy = {"budget": {"type": "tokens", "keep": 10}}
    shown = picture(1, (2, 1), "tiles")
    few: dict[str, Any] = {"max_patches": 4}
    for kwargs, rows, columns in (({}, 2, 4), (few, 1, 2), ({"images_kwargs": few}, 1, 2)):
        answer = engine.ask(Ask(family.ask_about("Why?"), [shown], policy, processor_kwargs=kwargs))
        tiles = rows * columns + 1
        assert [(report.visual_tokens, report.kept_tokens) for report in answer.images or ()] == [(tiles * 16, 10)]
        features = engine.runtime.encoder.cache.get(engine.processor.feature_key(shown, None, kwargs, {}))
        assert features is not None
        assert features.tiles is not None
        tops = {box[0] for box in features.tiles.boxes if box is not None}
        assert (len(tops), features.tiles.overview) == (rows, tiles - 1)


@pytest.mark.verify
@pytest.mark.parametrize("family", ["internvl"], indirect=True, scope="module")
def test_videos_pass_unpruned_in_either_order(checker: Checker, family: Family) -> None:
    frames, metadata = video()
    reference: Any = checker.reference
    moving = reference.video_embeds(frames)
    policy = {"budget": {"type": "tokens", "keep": 20}}
    for number, order in enumerate((f"{family.image}\n{family.video}", f"{family.video}\n{family.image}")):
        shown, name = picture(number, (3, 2), "video"), f"video-{number}"
        prompt = family.ask_about(f"{order}\nWhat moves before the bus?", images=0)
        pruning = {**policy, "texts": ["the bus"]}
        answer = checker.engine.ask(Ask(prompt, [shown], pruning, [name], videos=[(frames, metadata)]))
        reports = list(answer.images or ())
        assert [report.bypass_reason for report in reports][:: 1 - 2 * number] == [None, "unsupported_modality"]
        still, unpruned = reports[:: 1 - 2 * number]
        assert unpruned.kept_tokens == unpruned.visual_tokens == len(moving)
        kept = checker.reads(shown, name, policy, "the bus", still)
        assert len(kept) == 20
        prompt_ids = reference.prompt_ids(prompt, [len(kept)], len(frames))
        assert answer.prompt_ids == prompt_ids
        checker.compare(answer, [kept, moving][:: 1 - 2 * number])


def test_one_image_under_two_policies_in_one_prompt(checker: Checker) -> None:
    shown = picture(5, (3, 2), stamp="twice")
    policies = [{"budget": {"type": "tokens", "keep": keep}} for keep in (10, 30)]
    encoded_before = checker.engine.encodings()
    prompt = checker.family.ask_about("Compare.", images=3)
    answer = checker.ask(prompt, [shown] * 3, ["twice"] * 3, [*policies, False], ["Why?"] * 3)
    assert answer.images is not None
    assert answer.images[0].kept_tokens < answer.images[1].kept_tokens < answer.images[2].kept_tokens
    assert checker.engine.encodings() == encoded_before + 1


def test_images_at_the_same_time(checker: Checker, family: Family) -> None:
    """Requests that are prefilled together, some of whose images arrive as pixels and some as embeddings."""
    requests, alone = [], []
    for number, policy in enumerate((False, {"budget": {"type": "tokens", "keep": 20}}, False, {"method": "last"})):
        prompt = family.ask_about(f"What is in picture {number}?")
        requests.append(Ask(prompt, [picture(number, (2, 1), "together")], policy))
        alone.append(checker.engine.ask(Ask(prompt, [picture(number, (2, 1), "together")], policy)))
    checker.engine.forget_prompts()
    for got, expected in zip(checker.engine.ask_together(requests), alone, strict=True):
        assert got.prompt_ids == expected.prompt_ids
        assert got.token_ids == expected.token_ids


@pytest.mark.verify  # starts another engine; `make test` compares LLaVA-1.5's with stock vLLM's
def test_off_is_stock(family: Family, engine: Engine, stock: Any) -> None:
    """The prompts, tokens and log-probabilities of an engine without the plugin: not a bit may differ."""
    from tests.engine.stock_tiled import answers

    assert stock["processor"] == family.stock_processor
    assert stock["worker"]["model_class"] == family.stock_model
    assert not [name for name in stock["worker"]["modules"] if name.startswith("vllm_vtprune.plugin")]
    assert type(engine.processor).__name__ == family.processor
    worker = engine.llm.collective_rpc("worker_state")[0]
    assert worker["model_class"] == family.model
    assert worker["towers"] == 0
    assert f"vllm_vtprune.plugin.{family.name}" in worker["modules"]
    assert "vllm_vtprune.plugin.vision" not in worker["modules"]
    for pruning in (None, False):
        got = json.loads(json.dumps(answers(engine, family, pruning)))
        assert len(got) == len(stock["answers"]) > 10
        for ours, theirs in zip(got, stock["answers"], strict=True):
            assert all(math.isfinite(value) for step in theirs[2] for _, value in step)
            assert ours == theirs
        assert len({tuple(token_ids) for _, token_ids, _ in got}) > len(got) // 2, "answers depend on what was asked"


@pytest.mark.skipif(not os.environ.get("VTPRUNE_VERIFY"), reason="another engine; runs in make verify")
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_tiles_of_the_released_size(
    family: Family, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The papers' 640 and 320 tokens of LLaVA-NeXT's 2,880, chosen by each paper's method."""
    checkpoint = family.write(tmp_path, image_size=family.full_size)
    options = {**family.engine_options, "max_num_batched_tokens": 1024, "max_model_len": 8192}
    with running_engine(checkpoint, f"{family.name}-full", **options) as engine:
        checker = Checker(family, engine, family.reference(checkpoint))
        shown = picture(0, (1, 1)).resize((1000, 1000))
        for method, keep in (("resprune", 640), ("resprune", 320), ("adaptprune", 640), ("adaptprune", 320)):
            policy = {"method": method, "budget": {"type": "tokens", "keep": keep}}
            answer = checker.ask(family.ask_about(QUESTIONS[0]), [shown], ["full"], [policy], [QUESTIONS[0]])
            [report] = answer.images or ()
            assert keep <= report.kept_tokens <= keep + 48
            record_property(f"{method}_{keep}_of_{report.visual_tokens}", report.kept_tokens)
        record_property("worst_logprob_difference", max(checker.differences))


def test_the_tower_is_loaded_here_and_only_here(checker: Checker) -> None:
    assert state()["towers"] >= 1
    assert checker.engine.runtime.tower.weights == "checkpoint"

"""Every family: vLLM says about pruned images what plain transformers says about the same kept tokens.

Prefill goes in chunks smaller than an image, and every cache is on. The reference is built from the checkpoint alone.
What is kept is planned anew, from the reference's own tokens and what else the encoder told of the image.

One family with one of vLLM's model runners, where V2 takes one to four minutes:

    VTPRUNE_VERIFY=1 .venv/bin/python -m pytest -n 0 tests/engine/test_families.py -k "V2 and gemma3"
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from tests.engine.stock_families import WITHOUT_PLUGIN, answers, fresh_process, questions, serve
from tests.support.engines import (
    BLOCK,
    MODEL_RUNNERS,
    TOLERANCE,
    Answer,
    Ask,
    Engine,
    assert_same,
    running_engine,
    worst,
)
from tests.support.families import FAMILIES, Chat, Family, Turn
from tests.support.unpruned import TwinReference, UnprunedReference
from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.plugin.request import PromptPruning
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.sent_plan import SentPlan

pytestmark = pytest.mark.engine

TIE = 1e-4
"""Tokens whose log-probabilities in the reference are closer than this may change places."""

PORTRAIT, LANDSCAPE, SQUARE = 0, 1, 2
QUESTION, NOUNS = "Where is the cat?", ("cat",)


def ratio(keep: float, **policy: object) -> dict[str, Any]:
    return {**policy, "budget": {"type": "ratio", "keep": keep}}


BLIND = {"alpha": 0, "seed_token": "norm"}
"""ResPrune that reads nothing but the tokens. Past their rank (128 in the tiny encoders), rounding chooses."""

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "resprune-0.2": ((PORTRAIT, LANDSCAPE), ratio(0.2, **BLIND)),
    "divprune-0.8": ((SQUARE, PORTRAIT, LANDSCAPE), ratio(0.8, method="divprune")),
    "energy-0.9": ((SQUARE,), {"budget": {"type": "energy", "threshold": 0.9}, "text": {"query": QUESTION}}),
    "default": ((PORTRAIT, LANDSCAPE), {"text": {"query": QUESTION}}),  # of an image of few tokens it may keep all
}
SHOWN = ((PORTRAIT,), (LANDSCAPE, SQUARE), (SQUARE, PORTRAIT, LANDSCAPE))
TEXT, BLIND_METHOD = {"text": {"query": QUESTION}}, {"method": "divprune"}
GRID = {
    f"{len(shown)}-of-{keep}": (shown, ratio(keep, **(TEXT if keep < 0.5 else BLIND_METHOD)))
    for shown in SHOWN
    for keep in (0.1, 0.5, 0.9)
}
"""More of them for `make verify`, on V1: what V2 does otherwise, `CASES` asks of it, and its interpreter takes long."""


RUNS = [
    pytest.param(runner, name, marks=[pytest.mark.verify] * (family.verify or runner == "V2"))
    for runner in MODEL_RUNNERS
    for name, family in FAMILIES.items()
    if runner == "V1" or not family.verify
]
"""Variants of a family, of which another row runs in `make test`, are left to `make verify`, and have V1 alone."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    runs = [run for run in RUNS if run.values[0] == "V1"] if metafunc.function is test_the_whole_grid else RUNS
    metafunc.parametrize(("model_runner", "family"), runs, indirect=True)


class Shown(NamedTuple):
    """An image of a prompt. `name`: what the client calls it. `policy`: False leaves it unpruned."""

    name: str
    image: Image.Image
    policy: Any


@pytest.fixture(scope="module")
def model_runner(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.write(tmp_path_factory.mktemp(family.name))


@pytest.fixture(scope="module")
def without_plugin(model_runner: str) -> Iterator[Executor]:
    """A process where vLLM is stock, for the engines of all families: it takes long to import vLLM."""
    with fresh_process(MODEL_RUNNERS[model_runner] | WITHOUT_PLUGIN) as process:
        yield process


@pytest.fixture(scope="module")
def stock(family: Family, checkpoint: Path, model_runner: str, without_plugin: Executor) -> Any:
    """What an engine without the plugin answers."""
    return without_plugin.submit(serve, family.name, checkpoint).result()


@pytest.fixture(scope="module")
def checker(
    family: Family, checkpoint: Path, model_runner: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checker]:
    environment = MODEL_RUNNERS[model_runner]
    with running_engine(checkpoint, family.name, environment=environment, **family.engine_options) as engine:
        assert engine.model_runner == model_runner
        if family.twin is None:
            reference = UnprunedReference(checkpoint)
        else:
            reference = TwinReference(family.twin(tmp_path_factory.mktemp("twin")), engine.processor)
        yield Checker(family, engine, reference, Chat(checkpoint))


def until_an_image(answer: Answer, image_token: int) -> Answer:
    """An answer up to a token that stands for images: random weights may give it, transformers does not read it."""
    end = [*answer.token_ids, image_token].index(image_token)
    return replace(answer, token_ids=answer.token_ids[: end + 1], logprobs=answer.logprobs[: end + 1])


class Checker:
    """Asks the engine, and compares with the reference."""

    def __init__(self, family: Family, engine: Engine, reference: UnprunedReference, chat: Chat) -> None:
        self.family, self.engine, self.reference, self.chat = family, engine, reference, chat
        self.pictures = family.pictures()
        self.worst = 0.0
        self._features: dict[str, torch.Tensor] = {}

    def shown(self, index: int, policy: Any) -> Shown:
        return Shown(f"picture-{index}", self.pictures[index], policy)

    def request(self, turns: Sequence[Turn], shown: Sequence[Shown]) -> Ask:
        """The policies of no image at all are not sent."""
        pruning = {"images": [each.policy for each in shown]} if shown else None
        return Ask(self.chat.prompt(turns), [each.image for each in shown], pruning, [each.name for each in shown])

    def ask(self, turns: Sequence[Turn], shown: Sequence[Shown]) -> Answer:
        request = self.request(turns, shown)
        answer = self.engine.ask(request)
        self.compare(answer, request, shown)
        return answer

    def compare(self, answer: Answer, request: Ask, shown: Sequence[Shown]) -> None:
        """The prompt is that of the reference, each token of the answer its likeliest, log-probabilities are equal."""
        kept = [self.kept(each) for each in shown]
        images = [each.image for each in shown]
        answer = until_an_image(answer, self.reference.image_token)
        prompt_ids, logprobs, _ = self.reference.read(request.prompt, images, kept, answer.token_ids)
        assert answer.prompt_ids == prompt_ids
        behind = logprobs.max(dim=1).values - logprobs[range(len(logprobs)), answer.token_ids]
        assert behind.max() < TIE, f"{answer.token_ids} is not {logprobs.argmax(dim=1).tolist()}"
        difference = worst(answer, logprobs)
        assert difference < TOLERANCE
        self.worst = max(self.worst, difference)
        if request.pruning is not None:
            self.compare_reports(answer, shown, kept)

    def compare_reports(self, answer: Answer, shown: Sequence[Shown], kept: Sequence[torch.Tensor | None]) -> None:
        image_token = self.reference.model.config.image_token_id
        assert sum(report.kept_tokens for report in answer.images) == answer.prompt_ids.count(image_token)
        for report, each, positions in zip(answer.images, shown, kept, strict=True):
            everything = positions is not None and len(positions) == len(self._features[each.name])
            assert report.bypass_reason == ("budget_not_below_tokens" if everything else None)
            assert report.nouns == (NOUNS if PruningPolicy.parse(each.policy).conditions_on_text else ())

    def kept(self, shown: Shown) -> torch.Tensor | None:
        """(k,): which tokens are kept of an image; None for one that is left unpruned."""
        if shown.policy is False:
            return None
        if shown.name not in self._features:
            self._features[shown.name] = self.reference.features(shown.image)
        embeds = self._features[shown.name]
        features = self.engine.runtime.local.cache.get(shown.name)
        torch.testing.assert_close(features.embeds, embeds, rtol=0, atol=1e-4)
        assert (features.cls_attention is not None) == self.family.cls
        words = self.reference.words(NOUNS)
        policy, defaults = PruningPolicy.parse(shown.policy), self.engine.processor.family
        plan = plan_tokens(replace(features, embeds=embeds), policy, words, family=defaults)
        return plan.kept


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_those_of_transformers(
    case: str, checker: Checker, record_property: Callable[[str, object], None]
) -> None:
    """In two turns; at the second, what the first read is in the prefix cache."""
    indices, policy = (CASES | GRID)[case]
    shown = [checker.shown(index, policy) for index in indices]
    turns = [Turn(QUESTION, len(shown)), Turn("Is there a bus?")]
    once = checker.ask(turns[:1], shown)
    again = checker.ask(turns, shown)
    same = [token == other for token, other in zip(once.prompt_ids, again.prompt_ids, strict=False)]
    shared = [*same, False].index(False)
    assert shared >= len(once.prompt_ids) - 2, "templates may open an answer with something that they drop later"
    assert shared > BLOCK or len(once.prompt_ids) <= BLOCK + 2, "the prefix cache has whole blocks only"
    assert again.prefix_hits >= (shared - 1) // checker.family.block * checker.family.block
    assert [report.cached for report in again.images or ()] == [True] * len(shown)
    record_property("worst_logprob_difference", checker.worst)


@pytest.mark.verify
@pytest.mark.parametrize("case", GRID)
def test_the_whole_grid(case: str, checker: Checker, record_property: Callable[[str, object], None]) -> None:
    test_greedy_answers_are_those_of_transformers(case, checker, record_property)


def test_the_engine_selects_the_same_tokens(checker: Checker) -> None:
    """In its encoder step, as the API process does: one image, several, in one batch with unpruned ones, and cached."""
    methods = ["divprune", "dart", "pool", *(["vispruner", "visionzip"] if checker.family.cls else [])]
    policies = [ratio(0.2, **BLIND), ratio(0.4, **TEXT), ratio(1.0), *(ratio(0.3, method=method) for method in methods)]
    prompts = [[checker.shown(index, policy)] for policy in policies for index in (PORTRAIT, LANDSCAPE)]
    prompts.append([checker.shown(PORTRAIT, policies[0]), checker.shown(LANDSCAPE, False)])
    prompts.append([checker.shown(index, policy) for index, policy in enumerate((policies[1], False, policies[3]))])
    requests = [checker.request([Turn(QUESTION, len(shown))], shown) for shown in prompts]
    mrope = checker.engine.llm.llm_engine.model_config.uses_mrope
    if not checker.engine.processor.family.fixed_length or (mrope and checker.engine.model_runner == "V1"):
        checker.engine.select_in("engine")
        with pytest.raises(PolicyError, match="M-RoPE" if mrope else "this model's prompt"):
            checker.engine.ask(requests[0])
        checker.engine.select_in("auto")
        [image] = checker.engine.ask(requests[0]).images or ()
        assert image.placement == "api"
        assert image.placement_reason
    else:
        expected = [checker.engine.ask(request) for request in requests]
        encodings = checker.engine.encodings()
        checker.engine.select_in("engine")
        for _ in ("new", "cached"):
            for answer, same in zip(checker.engine.ask_together(requests), expected, strict=True):
                assert_same(answer, same)
                placements = [
                    None if image.method == "none" or image.bypass_reason else "engine" for image in same.images or ()
                ]
                assert [image.placement for image in answer.images or ()] == placements
        assert checker.engine.encodings() == encodings
    checker.engine.select_in("api")


def test_a_plan_of_another_process_is_followed(checker: Checker) -> None:
    """As by a consumer for which nothing is saved: the engine takes what the plan says, and nothing else encodes."""
    defaults = checker.engine.processor.family

    def asked(shown: Sequence[Shown], plans: Sequence[Any] = ()) -> Ask:
        sent = [None if plan is None else SentPlan.read(plan, "plan") for plan in plans] or [None] * len(shown)
        policies = [PruningPolicy.parse(each.policy).resolve(defaults) for each in shown]
        jobs = [
            ImageJob(policy, QUESTION, sends_plan=not plans, sent_plan=plan)
            for policy, plan in zip(policies, sent, strict=True)
        ]
        request = checker.request([Turn(QUESTION, len(shown))], shown)
        return replace(request, pruning=PromptPruning(policies[0], tuple(jobs)))

    energy, merging = {"budget": {"type": "energy", "threshold": 0.9}, **TEXT}, ratio(0.3, method="pool")
    prompts = [
        [checker.shown(SQUARE, energy)],
        [checker.shown(LANDSCAPE, merging)],
        [checker.shown(PORTRAIT, ratio(0.2, **BLIND)), checker.shown(LANDSCAPE, False), checker.shown(SQUARE, energy)],
    ]
    expected = [checker.engine.ask(asked(shown)) for shown in prompts]
    assert [[plan is not None for plan in answer.plans] for answer in expected] == [[True], [True], [True, False, True]]
    encodings = checker.engine.encodings()
    checker.engine.forget_prompts()
    checker.engine.runtime.forget_images()
    requests = [asked(shown, answer.plans) for shown, answer in zip(prompts, expected, strict=True)]
    for _ in ("new", "cached"):
        for answer, same in zip(checker.engine.ask_together(requests), expected, strict=True):
            assert_same(answer, replace(same, images=[replace(image, kept=None) for image in same.images or ()]))
    assert checker.engine.encodings() == encodings


def test_another_token_would_be_seen(checker: Checker) -> None:
    """One of those kept, replaced by its neighbour that is not."""
    shown = checker.shown(SQUARE, ratio(0.2, **BLIND))
    answer = checker.ask([Turn("What is it?", 1)], [shown])
    kept = checker.kept(shown)
    others = sorted(set(range(int(kept.max()))) - set(kept.tolist()))
    wrong = kept.clone()
    wrong[len(kept) // 2] = min(others, key=lambda other: abs(other - int(kept[len(kept) // 2])))
    prompt = checker.chat.prompt([Turn("What is it?", 1)])
    logprobs = checker.reference.logprobs(prompt, [shown.image], [wrong.sort().values], answer.token_ids)
    assert worst(answer, logprobs) > 2 * TOLERANCE


def test_pruned_and_unpruned_images_in_one_prompt_and_in_one_batch(checker: Checker) -> None:
    pruned, blind = ratio(0.5, method="divprune"), ratio(0.2, **BLIND)
    prompts = [
        [checker.shown(PORTRAIT, pruned), checker.shown(LANDSCAPE, False), checker.shown(SQUARE, blind)],
        [checker.shown(LANDSCAPE, False)],
        [checker.shown(SQUARE, pruned)],
        [],
        [checker.shown(SQUARE, False), checker.shown(PORTRAIT, blind)],
    ]
    requests = [checker.request([Turn("What is it?", len(shown))], shown) for shown in prompts]
    requests[1] = replace(requests[1], pruning=None)  # as a client writes who knows of no pruning
    for attempt in ("new", "cached"):
        if attempt == "new":
            checker.engine.forget_prompts()
        for request, shown, answer in zip(requests, prompts, checker.engine.ask_together(requests), strict=True):
            checker.compare(answer, request, shown)


def test_a_request_asked_again_is_served_from_the_caches(checker: Checker) -> None:
    shown = [Shown(f"again-{index}", image, ratio(0.2)) for index, image in enumerate(checker.family.pictures("again"))]
    turns = [Turn(QUESTION, len(shown))]
    encodings = checker.engine.encodings()
    first = checker.ask(turns, shown)
    assert checker.engine.encodings() == encodings + len(shown)
    again = checker.engine.ask(checker.request(turns, shown))
    assert checker.engine.encodings() == encodings + len(shown)
    assert again.prefix_hits >= (len(again.prompt_ids) - 1) // checker.family.block * checker.family.block
    assert [report.cached for report in again.images or ()] == [True] * len(shown)
    assert_same(again, first)


def test_off_is_stock(family: Family, checker: Checker, stock: Any) -> None:
    """The prompts, tokens and log-probabilities of an engine without the plugin: not a bit may differ."""
    assert stock["worker"]["model_class"].startswith("vllm.model_executor.models.")
    worker = checker.engine.llm.collective_rpc("worker_state")[0]
    assert stock["worker"]["model_runner"] == worker["model_runner"]
    assert worker["model_class"].startswith("vllm_vtprune.plugin.")
    [stock_answers] = stock["answers"]
    assert len(stock_answers) == len(questions(family, checker.chat, None))
    assert all(math.isfinite(value) for _, _, steps in stock_answers for step in steps for _, value in step)
    assert len({tuple(token_ids) for _, token_ids, _ in stock_answers}) > 3, "answers depend on what was asked"
    for pruning in (None, False):
        assert answers(checker.engine, family, checker.chat, pruning) == stock_answers

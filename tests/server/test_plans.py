"""Plans of a producer, followed by a consumer: the same hash, count and positions, without an encoder of its own."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.config import ECTransferConfig

from tests.support.chat import Body, image_part, tokens, url_of, user
from tests.support.rendering import Endpoint, endpoint
from vllm_vtprune.plugin.items import KEPT_POSITIONS
from vllm_vtprune.plugin.selection import SELECTION, Selection
from vllm_vtprune.sent_plan import PLANS
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_server.memory import prunes_outside_engine

pytestmark = pytest.mark.engine

QUESTION = "Where is the dog and the red bus?"
ENERGY: Body = {"budget": {"type": "energy", "threshold": 0.9, "min_tokens": 8}}
_seeds = count()


def picture() -> str:
    """Noise, of another half, that no earlier request showed."""
    noise = np.random.default_rng(next(_seeds)).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    noise[:, 160:] = 90
    return url_of(Image.fromarray(noise))


def ask(policy: object, *images: Body | str, **fields: Any) -> Body:
    return {"messages": [user(QUESTION, *(images or (picture(),)))], "pruning": policy, **fields}


@dataclass(frozen=True)
class Pair:
    """A producer and a consumer of one model."""

    family: str
    producer: Endpoint
    consumer: Endpoint

    def plans(self, body: Body) -> tuple[Body, list[Any]]:
        """The producer's answer, and its plans."""
        response = self.producer.post({**body, PLANS: True})
        assert response.status_code == 200, response.text
        answer = response.json()
        return answer, answer.pop(PLANS, [])

    def follow(self, body: Body, plans: object) -> Body:
        response = self.consumer.post({**body, PLANS: plans})
        assert response.status_code == 200, response.text
        answer: Body = response.json()
        return answer


def connector(tmp_path: Path, role: Any) -> ECTransferConfig:
    extra = {"shared_storage_path": str(tmp_path)}
    return ECTransferConfig(ec_connector="ECExampleConnector", ec_role=role, ec_connector_extra_config=extra)


FAMILIES = ("llava", "qwen3_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("store")
    with ExitStack() as stack:
        producer, consumer = (
            stack.enter_context(
                endpoint(tiny_checkpoint(request.param), dtype="float32", ec_transfer_config=connector(folder, role))
            )
            for role in ("ec_producer", "ec_consumer")
        )
        yield Pair(request.param, producer, consumer)


def images_of(answer: Body, *ignored: str) -> list[Body]:
    images = answer["pruning"]["images"]
    return [{name: value for name, value in image.items() if name not in ignored} for image in images]


def hashes(served: Endpoint) -> list[str]:
    return [feature.identifier for feature in served.requests[-1].mm_features or ()]


POLICIES: dict[str, Body] = {
    "energy": ENERGY,
    "preset": {"preset": "balanced"},
    "tokens": tokens(20),
    "positions": {**tokens(20), "return_kept": True},
    "of its own count": {"method": "prumerge", "budget": {"type": "method"}},
    "merging": {**ENERGY, "method": "tome"},
    "all": {"budget": {"type": "energy", "min_tokens": 2000}},
    "resized": {"method": "resize", "budget": {"type": "tokens", "keep": 12}},
    "lossless": {**ENERGY, "crop_borders": True, "dedup": True, "alpha": 0, "seed_token": "norm"},
}
OF_ONE_FAMILY = {"of its own count": "llava", "merging": "llava", "resized": "qwen3_vl"}
CASES = [(family, name) for family in FAMILIES for name in POLICIES if OF_ONE_FAMILY.get(name, family) == family]


@pytest.mark.parametrize(("pair", "name"), CASES, indirect=["pair"], scope="module")
def test_a_consumer_makes_the_producer_s_hash_and_report(pair: Pair, name: str) -> None:
    body = ask(POLICIES[name])
    produced, plans = pair.plans(body)
    for cached in (False, True):
        answer = pair.follow(body, plans or None)
        wanted = "cached" if name == "positions" else "kept"  # the producer's report has it for the plan
        assert images_of(answer, "cached", wanted) == images_of(produced, "cached", wanted)
        assert [image["cached"] for image in images_of(answer)] == [cached]
        assert hashes(pair.consumer) == hashes(pair.producer)
        assert pair.consumer.requests[-1].prompt_token_ids == pair.producer.requests[-1].prompt_token_ids
    assert (answer["pruning"]["images"][0]["kept"] is not None) == (name == "positions")
    assert pair.consumer.processor.runtime.encoder.num_parameters is None, "it has no encoder"


def test_images_with_and_without_a_plan(pair: Pair) -> None:
    own = [image_part(picture(), pruning=policy) for policy in (False, ENERGY, tokens(9), {**ENERGY, "method": "dart"})]
    body = ask("balanced", *own, picture())
    produced, plans = pair.plans(body)
    in_engine = pair.family == "llava"
    assert [plan is None for plan in plans] == [True, False, in_engine, False, False]
    answer = pair.follow(body, plans)
    assert images_of(answer, "cached", "kept") == images_of(produced, "cached", "kept")
    assert hashes(pair.consumer) == hashes(pair.producer)


def test_a_budget_of_the_request(pair: Pair) -> None:
    body = ask({"budget": {"type": "tokens", "keep": 60, "scope": "request"}}, picture(), picture())
    produced, plans = pair.plans(body)
    answer = pair.follow(body, plans)
    assert sum(image["allotted_tokens"] for image in images_of(answer)) == 60
    assert images_of(answer, "cached", "kept") == images_of(produced, "cached", "kept")
    assert hashes(pair.consumer) == hashes(pair.producer)


def test_what_the_engine_gets_of_a_planned_image(pair: Pair) -> None:
    """Pixels, for the case that nothing is saved, and the planned positions, on the CPU."""
    body = ask(ENERGY)
    _, [plan] = pair.plans(body)
    pair.follow(body, [plan])
    [feature] = pair.consumer.requests[-1].mm_features or ()
    item = feature.data
    assert item is not None
    kept = [index for start, length in plan["kept"]["runs"] for index in range(start, start + length)]
    assert item[KEPT_POSITIONS].data.tolist() == kept
    assert item[KEPT_POSITIONS].field.keep_on_cpu
    assert "pixel_values" in item
    selection = Selection.read(item[SELECTION].data)
    assert (selection.keep, selection.key) == (len(kept), hashes(pair.consumer)[0])
    assert selection.keep == plan["kept_tokens"]


# --- refused --------------------------------------------------------------------------------------------------------


def test_without_a_plan_a_consumer_refuses_what_it_cannot_follow(pair: Pair) -> None:
    error = pair.consumer.error(ask(ENERGY))
    assert error["param"] == "pruning.budget.type"
    assert "the request brings no plan of a producer" in error["message"]
    error = pair.consumer.error(ask("fast", image_part(picture(), pruning="balanced"), **{PLANS: [None]}))
    assert error["param"] == "messages.0.content.0.pruning.budget.type"
    text = {"messages": [{"role": "user", "content": "Where?"}], "pruning": ENERGY}
    assert pair.consumer.post(text).status_code == 200, "there is nothing to plan"


@pytest.mark.parametrize(
    ("change", "param", "problem"),
    [
        (lambda plan: [plan, plan], PLANS, "a list with an entry for each of the 1 images"),
        (lambda plan: True, PLANS, "a list with an entry for each of the 1 images"),
        (lambda plan: [7], f"{PLANS}.0", "expected a plan as a producer sends it"),
        (lambda plan: [with_runs(plan, [[5, 2], [1, 2]])], f"{PLANS}.0.kept.runs", "expected ascending runs"),
        (
            lambda plan: [with_runs(plan, [[0, 2**62]])],
            f"{PLANS}.0",
            " tokens; expected a producer with the same model",
        ),
        (lambda plan: [with_runs(plan, [[0, 3]])], f"{PLANS}.0", " tokens, here 3 of "),
        (lambda plan: [{**plan, "visual_tokens": 5}], f"{PLANS}.0", " of 5 tokens, here "),
    ],
    ids=["two for one", "no list", "no plan", "unordered", "beyond the image", "another count", "another image"],
)
def test_a_plan_that_does_not_fit_is_refused(pair: Pair, change: Any, param: str, problem: str) -> None:
    body = ask(ENERGY)
    _, [plan] = pair.plans(body)
    error = pair.consumer.error({**body, PLANS: change(plan)})
    assert error["param"] == param
    assert problem in error["message"]
    pair.follow(body, [plan])


def with_runs(plan: Body, runs: list[list[int]]) -> Body:
    return {**plan, "kept": {**plan["kept"], "runs": runs}}


def test_a_plan_for_an_image_that_is_not_pruned_is_refused(pair: Pair) -> None:
    body = ask(ENERGY)
    _, plans = pair.plans(body)
    error = pair.consumer.error({**body, "pruning": False, PLANS: plans})
    assert error["param"] == PLANS
    assert "which this consumer does not prune" in error["message"]


@pytest.mark.parametrize("pair", ["llava"], indirect=True, scope="module")
def test_a_merge_that_the_consumer_s_engine_could_not_repeat_is_refused(pair: Pair) -> None:
    processor = pair.consumer.processor
    able = processor.engine_placement
    processor.engine_placement = replace(able, no_hooks="the encoder is compiled")
    try:
        body = ask({**ENERGY, "method": "tome"})
        error = pair.consumer.error({**body, PLANS: pair.plans(body)[1]})
        assert error["param"] == f"{PLANS}.0"
        assert "method tome merges tokens by what it reads inside the encoder" in error["message"]
        body = ask({**ENERGY, "method": "vispruner"})  # its rows need no hooks, once the plan says which
        pair.follow(body, pair.plans(body)[1])
    finally:
        processor.engine_placement = able


@pytest.mark.parametrize(
    ("role", "only", "outside"),
    [(None, False, True), (None, True, False), ("ec_producer", True, True), ("ec_consumer", False, False)],
)
def test_who_may_need_memory_for_an_encoder_outside_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str | None, only: bool, outside: bool
) -> None:
    transfer = None if role is None else connector(tmp_path, role)
    arguments = Namespace(mm_encoder_only=only, ec_transfer_config=transfer)
    assert prunes_outside_engine(arguments) == outside
    monkeypatch.setenv("VTPRUNE_PLACEMENT", "engine")
    assert not prunes_outside_engine(arguments)


def test_who_may_ask_for_plans_and_bring_them(pair: Pair) -> None:
    error = pair.producer.error({**ask("fast"), PLANS: []})
    assert (error["param"], error["message"]) == (PLANS, f"{PLANS}: [] is not accepted; expected true.")
    batch = {"messages": [ask("fast")["messages"]], PLANS: True}
    response = pair.producer.post(batch, "/v1/chat/completions/batch")
    assert (response.status_code, response.json()["error"]["param"]) == (400, PLANS)


def test_other_servers_know_no_such_field() -> None:
    with endpoint(tiny_checkpoint()) as served:
        for value in (True, []):
            error = served.error({**ask("fast"), PLANS: value})
            assert error["param"] == PLANS
            assert error["message"].startswith(f"{PLANS}: unknown field (did you mean pruning?)")

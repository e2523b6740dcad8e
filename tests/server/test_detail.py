"""OpenAI's ``detail`` of an image chooses its policy, if the operator wants that."""

from typing import Any

import pytest

from tests.support.apis import STREAMS, WHOLE, Ask
from tests.support.chat import VISUAL_TOKENS, Body, Server, fresh_url, tokens
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.presets import DETAIL_DEFAULTS, PresetsFile
from vllm_vtprune_server.policies import Policies

EVERY_API = [*WHOLE.values(), *STREAMS.values()]
IDS = [*WHOLE, *(f"{name}-stream" for name in STREAMS)]
FAST, QUALITY = 64, 400  # the server's own preset `quality` keeps that many


def fresh(**fields: Any) -> Body:
    return {"url": fresh_url(), **fields}


@pytest.mark.engine
@pytest.mark.parametrize("ask", EVERY_API, ids=IDS)
def test_each_detail_chooses_its_policy(server: Server, ask: Ask, default_keep: int) -> None:
    answer = ask(server, fresh(detail="low"), fresh(detail="high"), fresh(detail="original"))
    assert answer.kept == [FAST, QUALITY, VISUAL_TOKENS]
    assert [image["detail"] for image in answer.report["images"]] == ["low", "high", "original"]
    assert "preset=mixed" in answer.header
    answer = ask(server, fresh(detail="auto"), fresh())
    assert (answer.kept, [image["detail"] for image in answer.report["images"]]) == ([default_keep] * 2, [None] * 2)


@pytest.mark.engine
@pytest.mark.parametrize("ask", WHOLE.values(), ids=WHOLE.keys())
def test_a_policy_beside_the_image_wins_and_one_of_the_request_yields(server: Server, ask: Ask) -> None:
    images = [fresh(detail="low", pruning=tokens(20)), fresh(detail="low"), fresh(detail="auto")]
    answer = ask(server, *images, pruning=tokens(30))
    assert (answer.kept, [image["detail"] for image in answer.report["images"]]) == (
        [20, FAST, 30],
        [None, "low", None],
    )
    assert ask(server, *images, model="llava@off").kept == [20, FAST, VISUAL_TOKENS]


@pytest.mark.engine
def test_the_server_says_what_it_follows(server: Server) -> None:
    information = server.get("/v1/pruning").json()
    assert information["detail"] == {
        "low": information["presets"]["fast"],
        "high": information["presets"]["quality"],
        "original": {"method": "none"},
    }


def test_without_the_option_it_chooses_nothing() -> None:
    policies = Policies.of()
    assert (policies.by_detail("low"), policies.by_auto_detail) == (None, None)


def test_the_operator_s_table_replaces_single_entries() -> None:
    presets = PresetsFile(thumbnail=PruningPolicy.parse(tokens(24)))
    presets.detail = {"low": "thumbnail", "auto": tokens(50)}
    policies = Policies.of("fast", presets, follows_detail=True)
    assert policies.by_detail("low") == "thumbnail"
    assert policies.by_detail("high") == DETAIL_DEFAULTS["high"]
    assert policies.by_detail("auto") is None
    assert policies.by_auto_detail == tokens(50)


def test_a_policy_that_this_server_does_not_follow_stops_the_start() -> None:
    presets = PresetsFile()
    presets.detail = {"high": "balanced"}
    with pytest.raises(PolicyError, match=r'--pruning-detail high: a budget of the type "energy" depends on features'):
        Policies.of(presets=presets, fixed_counts="--pruning-placement engine", follows_detail=True)
    presets.detail = {"high": tokens(400)}
    assert Policies.of(presets=presets, fixed_counts="--pruning-placement engine", follows_detail=True).detail


def test_a_server_that_cannot_follow_quality_leaves_high_whole() -> None:
    policies = Policies.of(fixed_counts="--pruning-placement engine", follows_detail=True)
    assert policies.detail == {**DETAIL_DEFAULTS, "high": "off"}
    own = PresetsFile(quality=PruningPolicy.parse(tokens(400)))
    policies = Policies.of(presets=own, fixed_counts="--pruning-placement engine", follows_detail=True)
    assert policies.detail == DETAIL_DEFAULTS

"""What is asked one by one, and what follows from the times."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests import families, ttft
from tests.support.fake_chat import DONE, Reply, event, fake_chat, report, token, usage
from vllm_vtprune_evaluation.load.client import connect


def reply(body: dict[str, Any]) -> Reply:
    """As a server of ours that prunes to half, or stock vLLM where the field is missing; the token has no text."""
    if "prompt" in body:
        return Reply((event({"choices": [{"index": 0, "text": ""}]}), usage(len(body["prompt"]), 1), DONE))
    timings = {"text": None, "budget": 1.0, "select": 2.0, "encode": 500.0}
    more = {"pruning": report(kept=288) | {"timings_ms": timings}} if body.get("pruning") else {}
    return Reply((token("", "length"), usage(50, 1, **more), DONE))


def test_requests_have_one_token_and_are_measured_to_it() -> None:
    with fake_chat(reply) as fake, connect(fake.url, timeout=20) as client:
        stock, pruned = ttft.ask_about(client, "data:,"), ttft.ask_about(client, "data:,", "fast")
        text = ttft.ask_tokens(client, 7)
        assert min(map(ttft.seconds, (stock, pruned, text))) > 0
    assert (stock.pruning, pruned.keep_ratio, text.input_tokens) == (None, 0.5, 7)
    assert [body["max_tokens"] for body in fake.bodies] == [1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [(Reply((token("a"), usage(pruning=report(kept=576)), DONE)), "nothing was pruned"), (Reply((b"no",), 500), "500")],
)
def test_what_is_not_pruned_or_fails_is_no_measurement(answer: Reply, message: str) -> None:
    with (
        fake_chat(lambda _: answer) as fake,
        connect(fake.url, timeout=20) as client,
        pytest.raises(RuntimeError, match=message),
    ):
        ttft.ask_about(client, "data:,", "fast")


def test_a_family_is_measured_at_every_size_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def server(*_: object, **__: object) -> Iterator[str]:
        with fake_chat(reply) as fake:
            yield fake.url

    monkeypatch.setattr(families, "server", server)
    samples = families.measure(Path("model"), families.FAMILIES["llava"], ["336"], rounds=2)
    rows = families.summary(samples)
    assert [(row["keep"], row["visual_tokens"], row["kept_tokens"]) for row in rows] == [
        (keep, 576, 288) for keep in families.KEEPS
    ]
    assert [row["plan_s"] for row in rows] == pytest.approx([0.003] * 3)


def test_a_selection_that_costs_nothing_reaches_the_ideal() -> None:
    samples = {
        "E": [1.0, 1.0],
        "S_stock": [17.0, 18.0],
        "S_pruned": [4.0, 4.5],
        "stock": [18.0, 19.0],
        "cold": [5.0, 5.5],
        "hit": [4.0, 4.5],
        "off": [18.0, 19.0],
    }
    ratios = ttft.summary(samples, keep=128)["ratios"]
    assert ratios["share_of_ideal"]["value"] == pytest.approx(1.0)
    assert ratios["speedup_hit"]["value"] == pytest.approx(ratios["ideal_hit"]["value"])
    assert ratios["off_over_stock"]["value"] == pytest.approx(1.0)
    assert ratios["off_over_cold"] == ratios["speedup_cold"]
    assert ratios["off_over_hit"] == ratios["speedup_hit"]
    slower = ttft.summary({**samples, "cold": [10.0, 11.0]}, keep=128)["ratios"]
    assert slower["share_of_ideal"]["value"] == pytest.approx(0.5)

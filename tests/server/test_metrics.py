"""What `/metrics` says of the requests that a real server answered."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.chat import ENDLESS, Body, Server, by_energy, fresh_url, image_part, kept, tokens, user
from vllm_vtprune import __version__
from vllm_vtprune.text import text_pipeline_name

pytestmark = pytest.mark.engine


def test_metrics_count_what_was_served(server: Server) -> None:
    url = fresh_url()
    keys = [
        "vtprune:visual_tokens_total|method=resprune",
        "vtprune:visual_tokens_kept_total|method=resprune",
        "vtprune:keep_ratio_count|method=resprune",
        "vtprune:visual_tokens_total|method=none",
        "vtprune:visual_tokens_kept_total|method=none",
        "vtprune:images_total|placement=api",
        "vtprune:images_total|placement=engine",
        "vtprune:feature_cache_misses_total",
        "vtprune:feature_cache_hits_total",
        "vtprune:stage_seconds_count|stage=text",
        "vtprune:stage_seconds_count|stage=encode",
        "vtprune:stage_seconds_count|stage=select",
        "vtprune:bypass_total|reason=budget_not_below_tokens",
        "vtprune:errors_total",
    ]

    def grown_by(pruning: object, *more_images: str) -> dict[str, float]:
        before = server.metrics()
        server.ask(messages=[user("Where is the dog?", url, *more_images)], pruning=pruning)
        grown = server.metrics().since(before, *keys)
        return {key.removeprefix("vtprune:"): value for key, value in zip(keys, grown, strict=True) if value}

    pruned = {
        "visual_tokens_total|method=resprune": 576,
        "visual_tokens_kept_total|method=resprune": 72,
        "keep_ratio_count|method=resprune": 1,
        "stage_seconds_count|stage=text": 1,
    }
    selected = {"stage_seconds_count|stage=select": 1}
    encoded = {"feature_cache_misses_total": 1, "stage_seconds_count|stage=encode": 1}
    assert grown_by(by_energy(72)) == {**pruned, **selected, **encoded, "images_total|placement=api": 1}
    again = {**pruned, "images_total|placement=api": 1}
    assert grown_by(by_energy(72)) == again, "all from vLLM's processor cache"
    other = {**again, "visual_tokens_kept_total|method=resprune": 71, "feature_cache_hits_total": 1}
    assert grown_by(by_energy(71)) == {**other, **selected}, "features from our cache"
    assert grown_by(tokens(72)) == {**pruned, "images_total|placement=engine": 1}, "nothing is encoded here"
    assert grown_by(False) == {"visual_tokens_total|method=none": 576, "visual_tokens_kept_total|method=none": 576}
    twice = grown_by(by_energy(70), fresh_url())
    assert twice["visual_tokens_kept_total|method=resprune"] == 140
    assert (twice["feature_cache_hits_total"], twice["feature_cache_misses_total"]) == (1, 1)
    assert grown_by(tokens(576))["bypass_total|reason=budget_not_below_tokens"] == 1


def test_the_time_to_the_first_token_is_counted_by_method_and_share(server: Server) -> None:
    name = "vtprune:time_to_first_token_seconds"
    labels = ["method=uniform", "method=none", "keep_ratio=0-0.125", "keep_ratio=0.25-0.5", "keep_ratio=unpruned"]
    keys = [f"{name}_count", *(f"{name}_count|{label}" for label in labels)]
    messages = [user("Where is the dog?", fresh_url())]
    before = server.metrics()
    sixteenth = server.ask(messages=messages, pruning=tokens(36, method="uniform"))
    assert server.metrics().since(before, *keys) == (1, 1, 0, 1, 0, 0)
    half = server.stream(messages=messages, pruning=tokens(288, method="uniform"))[-1]
    assert server.metrics().since(before, *keys) == (2, 2, 0, 1, 1, 0)
    off = server.ask(messages=messages, pruning=False)
    assert server.metrics().since(before, *keys) == (3, 2, 1, 1, 1, 1)
    server.ask(messages=[{"role": "user", "content": "Where is the dog?"}])
    assert server.metrics().since(before, *keys) == (3, 2, 1, 1, 1, 1), "no image, nothing to compare"
    (seconds,) = server.metrics().since(before, f"{name}_sum")
    reported = sum(answer["pruning"]["timings_ms"]["ttft"] for answer in (sixteenth, half, off))
    assert seconds == pytest.approx(reported / 1000, abs=1e-5)


def test_requests_are_counted_by_what_became_of_them(server: Server) -> None:
    outcomes = ("finished", "refused", "failed", "aborted")
    keys = [f"vtprune:requests_total|outcome={outcome}" for outcome in outcomes]
    assert all(key in server.metrics().values for key in keys), "at zero before the first of its kind"
    before = server.metrics()
    messages = [user("Where is the dog?", fresh_url())]
    server.ask(messages=messages)
    server.stream(messages=messages)
    server.ask(messages=[{"role": "user", "content": "Where is the dog?"}])
    assert server.metrics().since(before, *keys) == (3, 0, 0, 0)
    for refused in (b"{", b'{"messages": 5}', b'{"messages": [], "model": "another"}'):
        assert server.post(refused).status_code in (400, 404)
    assert server.metrics().since(before, *keys) == (3, 3, 0, 0)
    by_vllm = [f"http_requests_total|status={status}" for status in ("2xx", "4xx")]
    wait_for(lambda: server.metrics().since(before, *by_vllm) == (3, 3))
    endless = {**server.defaults, **ENDLESS, "messages": messages}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=endless, timeout=120) as answer:
        next(answer.iter_lines())
    wait_for(lambda: server.metrics().since(before, *keys) == (3, 3, 0, 1))


def test_refused_policies_are_counted_apart(server: Server) -> None:
    keys = [f"vtprune:requests_total|preset={preset}" for preset in ("invalid", "none", "fast")]
    assert all(key in server.metrics().values for key in keys)
    before = server.metrics()
    messages = [user("Where is the dog?", fresh_url())]
    for fields in ({"pruning": "fst"}, {"pruning": {"alpha": -1}}, {"model": f"{server.model}@fst"}):
        assert server.post({"messages": messages, **fields}).status_code in (400, 404)
    beside = [user("Where is the dog?", image_part(fresh_url(), pruning="fst"))]
    assert server.post({"messages": beside, "pruning": "fast"}).status_code == 400
    assert server.post({"messages": [user("Where?", "nonsense")], "pruning": "fast"}).status_code == 400
    assert server.metrics().since(before, *keys) == (4, 0, 1)


REFUSED_LATE: list[Body] = [
    {"logprobs": True, "top_logprobs": 1000},
    {"logit_bias": {"99999999": 1.0}},
    {"structured_outputs": {"regex": "("}},
]
"""What vLLM looks at when the images have been pruned."""


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_late_is_refused_and_no_tokens_are_counted(server: Server, stream: bool) -> None:
    outcomes = [f"vtprune:requests_total|outcome={outcome}" for outcome in ("refused", "failed", "finished", "aborted")]
    counters = (
        "visual_tokens_total",
        "visual_tokens_kept_total",
        "keep_ratio_count",
        "time_to_first_token_seconds_count",
    )
    before = server.metrics()
    for fields in REFUSED_LATE:
        body = {"messages": [user("Where?", fresh_url())], "stream": stream, "pruning": by_energy(40), **fields}
        response = server.post(body)
        assert response.status_code == (200 if stream else 400)
        assert '"code":400' in response.text.replace(" ", "")
    assert server.metrics().since(before, *outcomes) == (len(REFUSED_LATE), 0, 0, 0)
    assert server.metrics().since(before, *(f"vtprune:{name}" for name in counters)) == (0, 0, 0, 0)
    assert server.metrics().since(before, "vtprune:stage_seconds_count|stage=select") == (len(REFUSED_LATE),)


def test_requests_and_tokens_are_counted_by_preset(server: Server) -> None:
    asked: dict[str, Body] = {
        "custom": {},  # this server's default is written out
        "fast": {"pruning": "fast"},
        "thumbnail": {"model": f"{server.model}@thumbnail"},
        "none": {"pruning": False},
    }
    known = server.metrics().values
    presets = server.get("/v1/pruning").json()["presets"]
    for preset in (*presets, "none", "custom", "mixed", "invalid"):
        assert f"vtprune:requests_total|preset={preset}" in known, "before the first of its kind"
    before = server.metrics()
    answers = [server.ask(**{"messages": [user("Where?", fresh_url())], **body}) for body in asked.values()]
    after = server.metrics()
    for counter, counts in (
        ("requests_total", [1] * 4),
        ("visual_tokens_total", [576] * 4),
        ("visual_tokens_kept_total", [sum(kept(answer)) for answer in answers]),
    ):
        keys = [f"vtprune:{counter}|preset={name}" for name in (*asked, "mixed")]
        assert after.since(before, *keys) == (*counts, 0)
    before = server.metrics()
    images = [image_part(fresh_url(), pruning=pruning) for pruning in ("fast", tokens(30))]
    server.ask(messages=[user("Compare.", *images)], pruning=False)
    server.ask(messages=[user("Where?", image_part(fresh_url(), pruning="fast"))], pruning=False)
    keys = [f"vtprune:requests_total|preset={name}" for name in ("mixed", "fast")]
    assert server.metrics().since(before, *keys) == (1, 1)


def test_requests_whose_images_are_not_ready_are_waiting(server: Server) -> None:
    name = "vtprune:requests_waiting"
    assert server.metrics()[name] == 0
    seen = threading.Event()

    def ask_on() -> None:
        while not seen.is_set():
            server.ask(messages=[user("Where?", fresh_url())])

    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(ask_on) for _ in range(12)]
        try:
            wait_for(lambda: server.metrics()[name] >= 2)
        finally:
            seen.set()
        for future in asked:
            future.result()
    assert server.metrics()[name] == 0


def test_a_gauge_says_since_when_it_answers(server: Server) -> None:
    assert time.time() - 24 * 3600 < server.metrics()["vtprune:start_time_seconds"] < time.time()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stages_are_counted_from_a_tenth_of_a_millisecond(server: Server) -> None:
    server.ask(messages=[user("Where is the dog?", fresh_url())])
    assert 'le="0.0001"' in next(
        line for line in server.get("/metrics").text.splitlines() if "stage_seconds_bucket" in line
    )


def test_one_gauge_says_what_runs(server: Server) -> None:
    [line] = [line for line in server.get("/metrics").text.splitlines() if "vtprune:build_info{" in line]
    assert line.endswith("} 1.0")
    for label in (
        f'version="{__version__}"',
        'vllm_version="0.32',
        f'text_pipeline="{text_pipeline_name()}"',
        'encoder_dtype="float32"',
        'encoder_device="',
        'placement="auto"',
        'encoder_weights="checkpoint"',
    ):
        assert label in line


def test_metrics_carry_the_served_name_and_help(server: Server) -> None:
    server.ask(messages=[user("Where is the dog?", fresh_url())])
    text = server.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vtprune:")]
    assert lines
    assert all(f'model_name="{server.model}"' in line for line in lines)
    assert "# HELP vtprune:visual_tokens_kept_total " in text
    assert server.metrics()["vtprune:feature_cache_bytes"] > 0
    assert server.metrics()["vtprune:keep_ratio_sum"] < server.metrics()["vtprune:keep_ratio_count"]

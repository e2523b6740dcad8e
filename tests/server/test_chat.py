"""Chat completions on a real server: what the `pruning` field does and what the report says."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support.chat import (
    ENDLESS,
    VISUAL_TOKENS,
    Body,
    Server,
    by_energy,
    fresh_url,
    image_part,
    kept,
    nouns,
    text_of,
    tokens,
    url_of,
    user,
)
from vllm_vtprune.text import text_pipeline_name

pytestmark = pytest.mark.engine

REPORT_KEYS = {"method", "preset", "budget", "text_pipeline", "untuned", "images", "timings_ms"}
STAGES = ["text", "encode", "budget", "select"]
OPTIONS_OF_STREAMS = [{}, {"stream_options": {"include_usage": True}}]


# --- the field ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pruning", "method", "preset", "budget", "count"),
    [
        (tokens(50), "resprune", None, {"type": "tokens", "keep": 50}, 50),
        (tokens(50, method="uniform"), "uniform", None, {"type": "tokens", "keep": 50}, 50),
        ({"budget": {"type": "ratio", "keep": 0.25}}, "resprune", None, {"type": "ratio", "keep": 0.25}, 144),
        ("fast", "resprune", "fast", {"type": "ratio", "keep": 1 / 9}, 64),
        ("off", "none", "off", None, VISUAL_TOKENS),
        (False, "none", None, None, VISUAL_TOKENS),
        ({"method": "none"}, "none", None, None, VISUAL_TOKENS),
        (None, "resprune", None, {"type": "tokens", "keep": 96}, 96),
    ],
)
def test_the_field_decides_how_many_tokens_stay(
    server: Server, pruning: object, method: str, preset: str | None, budget: Body | None, count: int
) -> None:
    answer = server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=pruning)
    report = answer["pruning"]
    assert (report["method"], report["preset"], report["budget"]) == (method, preset, budget)
    [image] = report["images"]
    assert (image["method"], image["visual_tokens"], image["kept_tokens"]) == (method, VISUAL_TOKENS, count)
    assert image["bypass_reason"] is None


def test_an_energy_budget_follows_the_image(server: Server) -> None:
    policy = {"budget": {"type": "energy", "threshold": 0.98, "min_tokens": 1}}
    pictures = {"flat": url_of(Image.new("RGB", (48, 48), "gray")), "noise": fresh_url()}
    images = {
        name: server.ask(messages=[user("Where is the dog?", url)], pruning=policy)["pruning"]["images"][0]
        for name, url in pictures.items()
    }
    for image in images.values():
        assert 0.98 <= image["energy"] <= 1
        assert 1 <= image["kept_tokens"] < VISUAL_TOKENS
    assert images["flat"]["kept_tokens"] < images["noise"]["kept_tokens"]


def test_a_budget_that_leaves_nothing_to_prune_says_so(server: Server) -> None:
    report = server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=tokens(5000))["pruning"]
    assert report["method"] == "none", "nothing was pruned"
    assert [image["kept_tokens"] for image in report["images"]] == [VISUAL_TOKENS]
    assert [image["bypass_reason"] for image in report["images"]] == ["budget_not_below_tokens"]


def test_images_of_several_messages(server: Server) -> None:
    first, second = image_part(fresh_url(), pruning=tokens(20)), image_part(fresh_url(), pruning=tokens(40))
    conversation = [user("The dog.", first), {"role": "assistant", "content": "Yes."}, user("The bus.", second)]
    answer = server.ask(messages=conversation)
    assert kept(answer) == [20, 40]
    assert nouns(answer) == [["dog"], ["bus"]]


def test_text_alone(server: Server) -> None:
    answer = server.ask(messages=[{"role": "user", "content": "Where is the dog?"}], pruning="fast")
    report = answer["pruning"]
    assert set(report) == REPORT_KEYS
    assert (report["images"], report["method"], report["preset"]) == ([], "none", "fast")
    assert answer["choices"][0]["message"]["content"]


def test_a_part_is_an_image_by_its_type(server: Server, default_keep: int) -> None:
    """As for vLLM, which ignores other keys of a part."""
    text = {"type": "text", "text": "Where is the dog?", "image_url": {"url": fresh_url()}}
    assert server.ask(messages=[{"role": "user", "content": [text]}])["pruning"]["images"] == []
    both = [text, image_part(fresh_url())]
    assert kept(server.ask(messages=[{"role": "user", "content": both}])) == [default_keep]
    untyped = [{"image_url": fresh_url()}, {"type": "text", "text": "Where is the dog?"}]
    assert kept(server.ask(messages=[{"role": "user", "content": untyped}])) == [default_keep]


@pytest.mark.parametrize(("policy", "placement"), [(tokens, "engine"), (by_energy, "api")])
def test_an_image_that_the_server_remembers_under_a_uuid(
    server: Server, policy: Callable[[int], Body], placement: str
) -> None:
    named = image_part(fresh_url(), uuid=f"a-cat-{placement}")
    shown = server.ask(messages=[user("Where is the dog?", named)], pruning=policy(30))
    before = server.metrics()
    recalled = server.ask(
        messages=[user("And the bus?", image_part(None, uuid=f"a-cat-{placement}"))], pruning=policy(40)
    )
    assert [image["placement"] for image in recalled["pruning"]["images"]] == [placement]
    assert kept(recalled) == [40]
    assert nouns(shown) == [["dog"]]
    assert nouns(recalled) == [["bus"]]
    assert server.metrics().since(before, "vtprune:feature_cache_misses_total") == (0,), "encoded again"


def test_the_schema_describes_the_field(server: Server) -> None:
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    operation = document["paths"]["/v1/chat/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    field = schemas[body]["properties"]["pruning"]
    assert field["examples"]
    [policy] = [schemas[option["$ref"].rsplit("/", 1)[1]] for option in field["anyOf"] if "$ref" in option]
    methods = {part["$ref"].rsplit("/", 1)[1]: schemas[part["$ref"].rsplit("/", 1)[1]] for part in policy["oneOf"]}
    assert {"method", "budget", "text", "alpha", "seed"} <= set(methods["ResPrune"]["properties"])
    assert all(method["additionalProperties"] is False for method in methods.values())
    for reference in references(field):
        assert reference.rsplit("/", 1)[1] in schemas
    for example in field["examples"]:
        assert server.post({"messages": [user("Where?", fresh_url())], "pruning": example}).status_code == 200


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for element in schema:
            yield from references(element)


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_is_complete(server: Server, default_keep: int) -> None:
    report = server.ask(messages=[user("Where is the dog?", fresh_url())])["pruning"]
    assert set(report) == REPORT_KEYS
    assert report["text_pipeline"] == text_pipeline_name()
    [image] = report["images"]
    assert image == {
        "method": "resprune",
        "visual_tokens": VISUAL_TOKENS,
        "kept_tokens": default_keep,
        "energy": None,  # a count was given, so nobody measured it
        "nouns": ["dog"],
        "text_fallback": None,
        "cached": False,
        "bypass_reason": None,
        "placement": "engine",
        "placement_reason": None,
        "detail": None,
        "kept": None,
        "border_tokens": None,
        "duplicate_tokens": None,
        "lossless_reason": None,
        "allotted_tokens": None,
    }
    assert list(report["timings_ms"]) == [*STAGES, "ttft", "total"]


def test_one_budget_is_divided_over_the_images(server: Server) -> None:
    blank = url_of(Image.new("RGB", (64, 64), (3, 7, 11)))
    pruning: Body = {"budget": {"type": "tokens", "keep": 100, "scope": "request"}}
    answer = server.ask(messages=[user("Where is the dog?", blank, fresh_url())], pruning=pruning)
    assert answer["pruning"]["budget"] == {**pruning["budget"], "min_tokens": 16}
    assert sum(kept(answer)) == 100
    assert kept(answer)[0] < kept(answer)[1]
    assert [image["allotted_tokens"] for image in answer["pruning"]["images"]] == kept(answer)

    whole = {"messages": [user("Where is the dog?", fresh_url())]}
    for cached in (False, True):  # the whole image is within its part
        answer = server.ask(**whole, pruning={"budget": {"type": "ratio", "keep": 1, "scope": "request"}})
        [image] = answer["pruning"]["images"]
        assert (image["cached"], image["bypass_reason"]) == (cached, "budget_not_below_tokens")
        assert (image["placement"], image["placement_reason"]) == (None, None)

    alone = image_part(fresh_url(), pruning=pruning)
    refused = server.post({"messages": [user("Where is the dog?", alone)]})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "messages.0.content.0.pruning.budget.scope")
    policy: Body = {"budget": {"type": "tokens", "keep": 1, "scope": "request"}}
    refused = server.post({"messages": [user("Where?", *[fresh_url()] * 2)], "pruning": policy})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "pruning.budget.keep")


@pytest.mark.parametrize("options", OPTIONS_OF_STREAMS, ids=["plain", "usage"])
def test_in_a_stream_the_last_event_has_the_report_and_no_other(server: Server, options: Body) -> None:
    url = fresh_url()
    request: Body = {"messages": [user("Where is the dog?", url)], "max_tokens": 48, "ignore_eos": True}
    chunks = server.stream(**request, **options)
    assert [i for i, chunk in enumerate(chunks) if "pruning" in chunk] == [len(chunks) - 1]
    assert set(chunks[-1]["pruning"]) == REPORT_KEYS
    assert ("usage" in chunks[-1]) == bool(options), "the last event is the one that a client expects"
    assert (chunks[-1]["choices"] == []) == bool(options)
    assert len(chunks) > 3, "tokens come one by one"

    whole = server.ask(**request)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    [streamed], [image] = chunks[-1]["pruning"]["images"], whole["pruning"]["images"]
    assert image == {**streamed, "cached": True}


@pytest.mark.parametrize("options", [None, *OPTIONS_OF_STREAMS], ids=["whole", "stream", "stream-usage"])
def test_several_answers_to_one_prompt(server: Server, options: Body | None) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    request = {"messages": messages, "n": 2, "temperature": 1, "max_tokens": 6, "seed": 1}
    before = server.metrics()
    if options is None:
        answer = server.ask(**request)
        report = answer["pruning"]
        texts = [choice["message"]["content"] for choice in answer["choices"]]
    else:
        chunks = server.stream(**request, **options)
        assert [i for i, chunk in enumerate(chunks) if "pruning" in chunk] == [len(chunks) - 1]
        report = chunks[-1]["pruning"]
        texts = [text_of(chunks, index) for index in range(2)]
        ended = [part["index"] for chunk in chunks for part in chunk["choices"] if part["finish_reason"]]
        assert sorted(ended) == [0, 1]
    assert all(texts)
    assert len(report["images"]) == 1
    check_timings(report["timings_ms"])
    grown = server.metrics().since(before, "vtprune:visual_tokens_total", "vtprune:visual_tokens_kept_total")
    assert grown == (VISUAL_TOKENS, 96), "the image was counted once"


def test_log_probabilities_come_along(server: Server) -> None:
    request = {"messages": [user("Where is the dog?", fresh_url())], "logprobs": True, "top_logprobs": 2}
    answer = server.ask(**request)
    listed = answer["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in listed] == [2] * answer["usage"]["completion_tokens"]
    assert kept(answer) == [96]

    chunks = server.stream(**request)
    parts = [part["logprobs"] for chunk in chunks for part in chunk["choices"] if part["logprobs"]]
    streamed = [entry for part in parts for entry in part["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in listed]
    assert [entry["logprob"] for entry in streamed] == pytest.approx([entry["logprob"] for entry in listed], abs=1e-3)
    assert kept(chunks[-1]) == [96]


def check_timings(timings: Body) -> None:
    assert 0 < timings["ttft"] <= timings["total"]
    known = [timings[stage] for stage in STAGES if timings[stage] is not None]
    assert all(milliseconds >= 0 for milliseconds in known)
    assert sum(known) <= timings["ttft"], "the stages come before the first token"


@pytest.mark.parametrize("stream", [False, True])
def test_timings_are_those_of_the_request(server: Server, stream: bool) -> None:
    request: Body = {"messages": [user("Where is the dog?", fresh_url())], "max_tokens": 200, "ignore_eos": True}
    request["pruning"] = by_energy(40)
    started = time.perf_counter()
    report = server.stream(**request)[-1]["pruning"] if stream else server.ask(**request)["pruning"]
    elapsed = (time.perf_counter() - started) * 1000
    timings = report["timings_ms"]
    check_timings(timings)
    assert all(timings[stage] is not None for stage in STAGES)
    assert timings["encode"] > 0
    assert timings["total"] <= elapsed
    assert timings["total"] > elapsed / 10, "in milliseconds, like the others"
    assert timings["ttft"] < 0.9 * timings["total"], "199 of the 200 tokens come after the first"


def test_stages_that_did_not_run_have_no_time(server: Server) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    off = server.ask(messages=messages, pruning=False)["pruning"]["timings_ms"]
    assert [off[stage] for stage in STAGES] == [None] * 4
    check_timings(off)
    server.ask(messages=messages, pruning=by_energy(40))
    again = server.ask(messages=messages, pruning=by_energy(40))["pruning"]["timings_ms"]
    in_engine = server.ask(messages=messages, pruning=tokens(40))["pruning"]["timings_ms"]
    for timings in (again, in_engine):
        assert [timings[stage] is None for stage in STAGES] == [False, True, True, True]
        check_timings(timings)


# --- what enters prefill --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [[False], [tokens(1)], [tokens(77)], [tokens(33), tokens(44)], [False, "fast"]])
def test_the_prompt_is_the_text_and_the_tokens_kept(server: Server, pruning: list[object]) -> None:
    question = "Where is the dog beside the red bus?"
    answer = server.ask(messages=[user(question, *[image_part(fresh_url(), pruning=policy) for policy in pruning])])
    prompt = "USER: " + "<image>\n" * len(pruning) + question + " ASSISTANT:"
    tokenized = server.post({"prompt": prompt, "add_special_tokens": False}, "/tokenize").json()
    text_tokens = tokenized["count"] - len(pruning)
    assert answer["usage"]["prompt_tokens"] == text_tokens + sum(kept(answer))
    assert answer["usage"]["prompt_tokens_details"]["multimodal_tokens"] == {"image": sum(kept(answer))}


def test_answers_do_not_depend_on_what_is_cached(server: Server) -> None:
    request = {
        "messages": [user("Where is the dog?", fresh_url(), fresh_url())],
        "max_tokens": 12,
        "logprobs": True,
        "pruning": tokens(60),
    }
    first, again = server.ask(**request), server.ask(**request)
    assert [image["cached"] for image in first["pruning"]["images"]] == [False, False]
    assert [image["cached"] for image in again["pruning"]["images"]] == [True, True]
    uncached, cached = (answer["choices"][0]["logprobs"]["content"] for answer in (first, again))
    assert [entry["token"] for entry in uncached] == [entry["token"] for entry in cached]
    assert [entry["logprob"] for entry in uncached] == pytest.approx([entry["logprob"] for entry in cached], abs=1e-3)


def test_a_client_that_hangs_up_ends_its_request(server: Server) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    body = {**server.defaults, **ENDLESS, "messages": messages}
    before = server.metrics()
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    deadline = time.monotonic() + 120
    generated = "vllm:generation_tokens_total"
    earlier = now = server.metrics()
    while now.since(before, generated) == (0,) or now.since(earlier, generated) != (0,):
        assert time.monotonic() < deadline, "the request goes on"
        time.sleep(1)
        earlier, now = now, server.metrics()
    assert now.since(before, generated)[0] < 4 * 1800

"""A request's record: its short forms and its line in the log."""

import base64
import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from pythonjsonlogger.json import JsonFormatter
from vllm.logging_utils.formatter import JSON_FORMAT

from tests.support.chat import Body, Server, by_energy, data_of, fresh_url, image_part, tokens, url_of_bytes, user
from vllm_vtprune import metrics
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport, StageRun
from vllm_vtprune_server.trace import Trace, logger

PRUNED = ImageReport("resprune", 576, 64, 0.99, ("secret",))
WHOLE = ImageReport("none", 576, 576)


def trace_of(*images: ImageReport, preset: str | None = None) -> Trace:
    report = RequestReport(list(images), stages=[StageRun("encode", began=0, seconds=0.0123)])
    trace = Trace(PruningPolicy(), report=report, request_id="chatcmpl-1", ttft=0.1)
    trace.note_preset([preset or metrics.NO_PRESET])
    return trace


def test_the_header_is_a_dictionary_of_tokens_and_integers() -> None:
    header = trace_of(PRUNED, WHOLE, preset="fast").header()
    assert header == "method=resprune, preset=fast, images=2, visual=1152, kept=640"
    assert trace_of().header() == "method=none, images=0, visual=0, kept=0"
    assert trace_of(PRUNED, preset=metrics.CUSTOM).header() == "method=resprune, images=1, visual=576, kept=64"
    mixed = trace_of(PRUNED, WHOLE, preset="fast")
    mixed.note_preset(["off"])
    assert mixed.header() == "method=resprune, preset=mixed, images=2, visual=1152, kept=640"


@pytest.mark.parametrize(
    ("kept", "band"),
    [
        (1, "0-0.125"),
        (72, "0-0.125"),
        (73, "0.125-0.25"),
        (144, "0.125-0.25"),
        (145, "0.25-0.5"),
        (288, "0.25-0.5"),
        (432, "0.5-0.75"),
        (575, "0.75-1"),
        (576, "unpruned"),
    ],
)
def test_bands_of_the_keep_ratio(kept: int, band: str) -> None:
    assert metrics.keep_ratio_band(kept, 576) == band


# --- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[StringIO]:
    """What the log gets, in vLLM's JSON."""
    output = StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter(JSON_FORMAT))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield output
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_pruned_request_is_one_line_with_its_id_and_none_of_its_text(logged: StringIO) -> None:
    trace_of(PRUNED, replace(PRUNED, cached=True), WHOLE, preset="fast").finish("finished", "model")
    [line] = logged.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["levelname"], entry["name"]) == ("INFO", "vllm.vtprune.requests")
    fields = entry["pruning"]
    assert fields["timings_ms"]["total"] > 0
    assert {name: value for name, value in fields.items() if name != "timings_ms"} == {
        "request_id": "chatcmpl-1",
        "outcome": "finished",
        "method": "resprune",
        "preset": "fast",
        "images": 3,
        "visual_tokens": 1728,
        "kept_tokens": 704,
        "cached_images": 1,
    }
    assert (fields["timings_ms"]["encode"], fields["timings_ms"]["select"]) == (12.3, None)
    assert entry["message"].startswith(
        "Request chatcmpl-1 finished: resprune kept 704 of 1728 visual tokens of 3 image(s), 1 cached; ms: encode=12.3"
    )
    assert "secret" not in line


def test_a_request_that_was_not_pruned_is_not_logged(logged: StringIO) -> None:
    trace_of(WHOLE).finish("finished", "model")
    trace_of().finish("finished", "model")
    assert logged.getvalue() == ""


def test_a_request_ends_once() -> None:
    def counted(outcome: str) -> float:
        labels = {"model_name": "of-this-test", "outcome": outcome, "preset": "none"}
        return REGISTRY.get_sample_value("vtprune:requests_total", labels) or 0.0

    trace = trace_of()
    trace.finish("failed", "of-this-test")
    trace.finish("finished", "of-this-test")
    assert (counted("failed"), counted("finished")) == (1, 0)


@pytest.mark.parametrize(("outcome", "counted"), [("finished", 640), ("refused", 0), ("failed", 0), ("aborted", 0)])
def test_tokens_are_counted_of_requests_that_finished(outcome: metrics.Outcome, counted: int) -> None:
    model = f"tokens-{outcome}"

    def total(name: str, **labels: str) -> float:
        families = {sample.name: family for family in REGISTRY.collect() for sample in family.samples}
        samples = families[name].samples if name in families else []
        wanted = {"model_name": model, **labels}.items()
        return sum(sample.value for sample in samples if sample.name == name and wanted <= sample.labels.items())

    trace = trace_of(PRUNED, WHOLE, replace(WHOLE, bypass_reason="budget_not_below_tokens"), preset="fast")
    trace.finish(outcome, model)
    served = int(counted > 0)
    assert total("vtprune:visual_tokens_kept_total", preset="fast") == (counted + 576) * served
    assert total("vtprune:visual_tokens_total", preset="fast") == 3 * 576 * served
    assert total("vtprune:keep_ratio_count") == 3 * served
    assert total("vtprune:bypass_total") == served
    assert total("vtprune:time_to_first_token_seconds_sum", keep_ratio="0.5-0.75") == pytest.approx(0.1 * served)


@pytest.mark.parametrize(
    ("asked", "label"), [(["fast"], "fast"), (["fast", "fast"], "fast"), (["fast", "none"], "mixed")]
)
def test_the_preset_of_a_request_is_that_of_all_its_images(asked: list[str], label: str) -> None:
    trace = Trace()
    assert trace.preset_label == "none"
    trace.note_preset(asked)
    assert trace.preset_label == label


def lines_about(log: Path, request_id: str) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if request_id in line and "Request" in line]


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
def test_the_server_s_log_names_the_request_by_its_client_s_id(server: Server, stream: bool) -> None:
    request_id = f"from-the-client-{'stream' if stream else 'whole'}"
    body: Body = {"messages": [user("Where is the zebra?", fresh_url())], "stream": stream, "pruning": by_energy(96)}
    response = server.post(body, headers={"x-request-id": request_id})
    assert response.status_code == 200
    [line] = lines_about(server.log, request_id)
    assert "INFO" in line
    assert "finished: resprune kept 96 of 576 visual tokens of 1 image(s), 0 cached" in line
    assert re.search(r"encode=[\d.]+ .*select=[\d.]+ ttft=[\d.]+ total=[\d.]+", line)
    assert "zebra" not in server.log.read_text(errors="replace")


SECRET = "xylophone"
HIDDEN = base64.b64encode(SECRET.encode() * 3).decode()

# body, what its line ends with
SECRETIVE: dict[str, tuple[Body | bytes, str]] = {
    "a policy": (
        {"pruning": {"method": SECRET}},
        "400 BadRequestError, pruning.method: expected one of none, resprune, ",
    ),
    "a preset": ({"pruning": SECRET}, "400 BadRequestError, pruning: expected an object, false, or a preset: "),
    "a key": ({"pruning": {HIDDEN: 1}}, "400 BadRequestError, pruning.?: expected one of method, budget, "),
    "a budget": ({"pruning": tokens(0)}, "400 BadRequestError, pruning.budget.keep: expected an integer from 1"),
    "an address": (
        {"messages": [user(SECRET, f"https://{SECRET}.example/{SECRET}.png")]},
        "400 BadRequestError, messages.0.content.0.image_url: is on the web, and --allowed-media-domains is not set",
    ),
    "an image": (
        {"messages": [user(SECRET, url_of_bytes(SECRET.encode() * 3))]},
        "400 BadRequestError, messages.0.content.0.image_url: ",
    ),
    "a path": (
        {"messages": [user("Hello."), user(SECRET, image_part(f"file:///{SECRET}"))]},
        "400 BadRequestError, messages.1.content.0.image_url: is a local file, and --allowed-local-media-path is not "
        "set",
    ),
    "a regex": ({"structured_outputs": {"regex": f"({SECRET}"}}, "400 BadRequestError"),
    "a model": ({"model": f"llava@{SECRET}"}, "404 NotFoundError, model"),
    "a number": ({"temperature": SECRET}, "400 BadRequestError, temperature"),
    "no JSON": (f'{{"messages": "{SECRET}", '.encode(), "400 BadRequestError"),
}


@pytest.mark.engine
@pytest.mark.parametrize(("body", "reason"), SECRETIVE.values(), ids=SECRETIVE.keys())
def test_a_refusal_is_one_line_of_the_server_s_log(server: Server, body: Body | bytes, reason: str) -> None:
    request_id = f"refused-{time.monotonic_ns()}"
    if isinstance(body, dict):
        body = {"messages": [user(f"Where is the {SECRET}?", fresh_url())], **body}
    response = server.post(body, headers={"x-request-id": request_id})
    assert response.status_code in (400, 404)
    [line] = lines_about(server.log, request_id)
    assert "INFO" in line
    assert f"Request chatcmpl-{request_id} to /v1/chat/completions refused: {reason}" in line
    assert "\\" not in line
    for secret in (SECRET, HIDDEN, "https:", "file:", ";base64"):
        assert secret not in line.partition("refused: ")[2]


@pytest.mark.engine
def test_a_refusal_within_a_stream_is_one_too(server: Server) -> None:
    request_id = f"refused-{time.monotonic_ns()}"
    body = {"messages": [user("Where?", fresh_url())], "logit_bias": {"99999999": 1.0}, "stream": True}
    response = server.post(body, headers={"x-request-id": request_id})
    assert json.loads(data_of(response.text)[0])["error"]["code"] == 400
    [line] = [line for line in lines_about(server.log, request_id) if "vtprune" in line or "refused" in line]
    assert f"Request chatcmpl-{request_id} to /v1/chat/completions refused: 400 BadRequestError" in line

"""A request's record: its short forms and its line in the log."""

import json
import logging
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from pythonjsonlogger.json import JsonFormatter
from vllm.logging_utils.formatter import JSON_FORMAT

from tests.support.chat import Server, fresh_url, user
from vllm_vtprune import metrics
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport, StageRun
from vllm_vtprune_server.trace import Trace, logger

PRUNED = ImageReport("resprune", 576, 64, 0.99, ("secret",))
WHOLE = ImageReport("none", 576, 576)


def trace_of(*images: ImageReport, preset: str | None = None) -> Trace:
    report = RequestReport(list(images), stages=[StageRun("encode", began=0, seconds=0.0123)])
    return Trace(PruningPolicy(), preset=preset, report=report, request_id="chatcmpl-1", ttft=0.1)


def test_the_header_is_a_dictionary_of_tokens_and_integers() -> None:
    header = trace_of(PRUNED, WHOLE, preset="fast").header()
    assert header == "method=resprune, preset=fast, images=2, visual=1152, kept=640"
    assert trace_of().header() == "method=none, images=0, visual=0, kept=0"


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
    trace_of(PRUNED, PRUNED.as_cached(), WHOLE, preset="fast").finish("finished", "model")
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
        return (
            REGISTRY.get_sample_value("vtprune:requests_total", {"model_name": "of-this-test", "outcome": outcome})
            or 0.0
        )

    trace = trace_of()
    trace.finish("failed", "of-this-test")
    trace.finish("finished", "of-this-test")
    assert (counted("failed"), counted("finished")) == (1, 0)


def lines_about(log: Path, request_id: str) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if request_id in line and "Request" in line]


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
def test_the_server_s_log_names_the_request_by_its_client_s_id(server: Server, stream: bool) -> None:
    request_id = f"from-the-client-{'stream' if stream else 'whole'}"
    body = {"messages": [user("Where is the zebra?", fresh_url())], "stream": stream}
    response = server.post(body, headers={"x-request-id": request_id})
    assert response.status_code == 200
    [line] = lines_about(server.log, request_id)
    assert "INFO" in line
    assert "finished: resprune kept 96 of 576 visual tokens of 1 image(s), 0 cached" in line
    assert re.search(r"encode=[\d.]+ .*select=[\d.]+ ttft=[\d.]+ total=[\d.]+", line)
    assert "zebra" not in server.log.read_text(errors="replace")

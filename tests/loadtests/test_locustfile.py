"""Locust with our users, as it is started from a shell, against a server that answers as told."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from loadtests.drive import KINDS, DriveFailed, drive
from loadtests.pace import ARRIVALS, Arrivals, moments
from tests.loadtests.test_workload import image_of
from tests.support.fake_chat import DONE, ROLE, Reply, event, fake_chat, report, token, usage
from tests.support.programs import run_module
from tests.support.samples import fifth
from vllm_vtprune_evaluation.load.records import load_records

Body = dict[str, Any]


def answer(body: Body) -> Reply:
    return Reply((ROLE, 0.02, token("a"), 0.02, token("b", "length"), usage(pruning=report(144)), DONE))


def locust(url: str, *arguments: str) -> CompletedProcess[str]:
    """Run Locust for two seconds to its end."""
    options = ["-f", "loadtests/locustfile.py", "--host", url, "--headless", "-t", "2s", "--stop-timeout", "20"]
    return run_module("locust", *options, *arguments)


def bodies_of(*arguments: str, reply: Callable[[Body], Reply] = answer) -> list[Body]:
    with fake_chat(reply) as fake:
        done = locust(fake.url, *arguments)
    assert done.returncode == 0, done.stderr
    return fake.bodies


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run of all kinds of user."""
    out = tmp_path_factory.mktemp("run") / "results"
    options = ["-u", "9", "-r", "9", "--out", str(out), "--label", "first", "--goodput", "ttft:60000"]
    bodies = bodies_of(*options, "--slo-ttft-p99-ms", "60000")
    (out / "bodies.json").write_text(json.dumps(bodies))
    return out


def test_every_kind_of_user_asks_and_is_recorded(out: Path) -> None:
    records = load_records(out / "requests.jsonl")
    bodies = json.loads((out / "bodies.json").read_text())
    assert {record.name for record in records} == set(KINDS)
    assert len(records) == len(bodies), "a request in flight at the end is waited for"
    assert all(record.error is None and record.keep_ratio == 0.25 for record in records)
    for body in bodies:
        assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("fake", 16, 0)


def test_results_are_written(out: Path) -> None:
    result = json.loads((out / "result.json").read_text())
    assert (result["label"], result["model_id"], result["max_concurrency"], result["failed"]) == ("first", "fake", 9, 0)
    assert result["completed"] == len(load_records(out / "requests.jsonl")) >= 9
    assert result["request_goodput"] == result["request_throughput"] > 0
    assert result["mean_ttft_ms"] >= 20
    assert set(result["vtprune"]["kinds"]) == set(KINDS)


def test_the_report_stands_by_itself(out: Path) -> None:
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 5
    assert "TTFT p99 (ms)" in html
    for reference in ("<script", "<link", "<img", "src=", "@import"):
        assert reference not in html


def test_the_same_seed_asks_the_same() -> None:
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(bodies_of, "-u", "1", "-t", "4s", "--seed", seed, "PolicyMix") for seed in "775"]
        first, second, other = (run.result() for run in runs)
    both = min(len(first), len(second))
    assert both > 3
    assert first[:both] == second[:both]
    assert first[:both] != other[:both]
    assert len({json.dumps(body) for body in first}) == len(first), "no request is sent twice"
    assert len({json.dumps(body["pruning"]) for body in first}) > 1


def test_a_policy_is_sent_as_the_field_says() -> None:
    """`test_options.py` has other forms."""
    policy = '{"budget": {"type": "tokens", "keep": 64}}'
    assert {json.dumps(body["pruning"]) for body in bodies_of("--pruning", policy, "FreshImages")} == {policy}


def test_without_a_policy_the_field_is_not_sent() -> None:
    assert all("pruning" not in body for body in bodies_of("FreshImages", "Conversations"))


def slow(body: Body) -> Reply:
    return Reply((ROLE, 1.0, token("a"), token("b", "length"), usage(), DONE))


@pytest.mark.parametrize("arrivals", fifth(ARRIVALS))
def test_a_constant_rate_is_kept_whatever_the_server_does(arrivals: Arrivals, tmp_path: Path) -> None:
    options = ["-u", "30", "-r", "30", "-t", "5s", "--rate", "10", "--arrivals", arrivals, "--seed", "3"]
    bodies_of(*options, "--out", str(tmp_path), "FreshImages", "Conversations", reply=slow)
    records = sorted(load_records(tmp_path / "requests.jsonl"), key=lambda record: record.started)
    pacing = json.loads((tmp_path / "result.json").read_text())["vtprune"]
    assert (pacing["offered_rate"], pacing["arrivals"], pacing["unsent"]) == (10, arrivals, 0)
    due = list(islice(moments(10, arrivals, seed=3), len(records)))
    assert due[-1] > 2, "of five seconds, less what thirty users take to start"
    for record, at in zip(records, due, strict=True):
        assert record.started - records[0].started == pytest.approx(at - due[0], abs=0.01), "due by the schedule"
    if pacing["max_stall_ms"] < 100:  # else the machine had no time for the client
        assert pacing["punctual"] > 0.9, "and sent then"
        assert pacing["achieved_rate"] == pytest.approx((len(due) - 1) / (due[-1] - due[0]), rel=0.1)


def test_where_all_users_are_busy_times_count_from_when_a_request_was_due(tmp_path: Path) -> None:
    with fake_chat(slow) as fake:
        done = locust(fake.url, "-u", "2", "-r", "2", "-t", "4s", "--rate", "10", "--out", str(tmp_path))
    records = sorted(load_records(tmp_path / "requests.jsonl"), key=lambda record: record.started)
    sent = [record for record in records if record.lag is not None]
    unsent = [record for record in records if record.lag is None]
    assert len(sent) == len(fake.bodies) < 12
    assert len(records) > len(sent) + 5, "what was due and not sent is not forgotten"
    assert sent[-1].e2e > sent[-1].lag + 0.99, "it waited to be sent, and a second for its answer"
    assert sent[-1].lag > sent[2].lag > 0.2, "each has waited longer than those before"
    assert {record.error for record in unsent} == {"not sent: all users were busy to the end"}
    pacing = json.loads((tmp_path / "result.json").read_text())["vtprune"]
    assert (pacing["unsent"], pacing["max_lag_ms"]) == (
        len(unsent),
        pytest.approx(1000 * max(record.lag for record in sent)),
    )
    assert (pacing["punctual"], pacing["achieved_rate"]) < (0.2, 4)
    assert "sent after it was due, p99 (ms)" in (tmp_path / "report.html").read_text()
    assert done.returncode == 1


@pytest.mark.parametrize("rate", fifth([["--rate", "3"], []]), ids=["open", "closed"])
def test_a_request_that_outlasts_the_run_is_a_failure(rate: list[str], tmp_path: Path) -> None:
    with fake_chat(lambda _: Reply((ROLE, 20.0, DONE))) as fake:
        done = locust(fake.url, "-u", "9", "-r", "9", "-t", "1s", "--stop-timeout", "2", *rate, "--out", str(tmp_path))
    records = load_records(tmp_path / "requests.jsonl")
    assert len(records) == len(fake.bodies) > 0
    assert {record.error for record in records} == {"unfinished when the run was over"}
    assert all(record.elapsed > 0.9 for record in records)
    assert done.returncode == 1


def test_the_others_do_not_wait_while_a_picture_is_made(tmp_path: Path) -> None:
    """Here one takes two seconds."""
    locustfile = tmp_path / "locustfile.py"
    locustfile.write_text(
        "from gevent.monkey import get_original\n"
        "from loadtests.locustfile import *\n\n"
        "class SlowImages(FreshImages):\n"
        "    def messages(self):\n"
        "        get_original('time', 'sleep')(2)\n"
        "        return super().messages()\n"
    )
    bodies_of("-f", str(locustfile), "-u", "4", "-r", "4", "-t", "6s", "--out", str(tmp_path), "SlowImages")
    records = load_records(tmp_path / "requests.jsonl")
    assert len(records) >= 6, "of four users; one after the other they would have three or four"
    assert json.loads((tmp_path / "result.json").read_text())["vtprune"]["p99_stall_ms"] < 1900


def test_a_broken_promise_is_status_1(tmp_path: Path) -> None:
    with fake_chat(answer) as fake:
        done = locust(fake.url, "--slo-ttft-p99-ms", "1", "--out", str(tmp_path), "FreshImages")
    assert done.returncode == 1
    assert "ttft p99 was to be 1 ms at most, and is " in done.stderr
    assert (tmp_path / "report.html").exists(), "the results are written all the same"


def test_a_failed_request_is_status_1(tmp_path: Path) -> None:
    error = event({"error": {"message": "<b>no</b>", "type": "InternalServerError", "code": 500}})
    with fake_chat(lambda _: Reply((token("a"), 0.2, error, DONE))) as fake:
        done = locust(fake.url, "--out", str(tmp_path), "FreshImages")
    assert done.returncode == 1
    assert "requests failed: InternalServerError: <b>no</b>" in done.stderr
    assert "&lt;b&gt;no&lt;/b&gt;" in (tmp_path / "report.html").read_text(), "what a server says is no markup"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "argument --rate: '0' is not accepted; expected a number above 0"),
        (["--picture", "336"], "argument --picture: '336' is not accepted; expected WIDTHxHEIGHT"),
        (["--processes", "2"], "one process gathers the results"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    with fake_chat(answer) as fake:
        done = locust(fake.url, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert fake.bodies == []


def test_a_server_that_is_not_there_is_status_2() -> None:
    done = locust("http://127.0.0.1:9/")
    assert done.returncode == 2
    assert "loadtests: no server answers at http://127.0.0.1:9/v1/models: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_from_python(tmp_path: Path) -> None:
    with fake_chat(answer) as fake:
        records = drive(
            fake.url,
            tmp_path / "new",
            users=2,
            seconds=1,
            kinds=["RepeatedImages"],
            options=["--seed", "3", "--picture", "56x28"],
        )
    assert {record.name for record in records} == {"RepeatedImages"}
    assert len(records) == len(fake.bodies)
    pictures = {body["messages"][0]["content"][0]["image_url"]["url"] for body in fake.bodies}
    assert 1 < len(pictures) <= 8
    assert {image_of(url).size for url in pictures} == {(56, 28)}


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text("an old result\n")
    with pytest.raises(DriveFailed, match="no server answers at"):
        drive("http://127.0.0.1:9", tmp_path, users=1, seconds=1, kinds=[], options=[])
